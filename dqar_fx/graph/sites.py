"""Find the attentions of a captured graph, who owns them, and where their value leaves.

A *site* is one attention as its model's author wrote it: usually a module with projections around
``scaled_dot_product_attention``, or around products that do the same (see ``attentions``). Storing what leaves that
module saves the most, since everything that only feeds it (norm, modulation, Q, K, V, the product, the out-projection)
is dead once the stored value is read. Nothing here knows a model by name; three questions about the graph decide:

* Does a module own the attention? Innermost first: a module that has parameters and either calls itself an attention
  or lets nothing but parameters past the attention to its output. A module that adds its own input back to the result
  is a *block*, not an attention: caching it would freeze the residual stream. What else the module computes (a norm
  behind the attention, an MLP beside it that shares its out-projection) is stored with it.
* If none does (the product stands in the block's own forward), follow the value through everything that mixes it with
  parameters only (reshape, out-projection, dropout) and stop before the first mix with another activation (the gate,
  the residual).
* Can the region be skipped? Not if it writes in place into something outside.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from dqar_fx.graph.attentions import (
    calls_itself_attention,
    is_attention,
    is_fused_layer,
    roles,
    written_out,
)
from dqar_fx.graph.capture import ModuleCall, module_stack
from dqar_fx.graph.effects import depending_on, storages, writers, written
from dqar_fx.graph.kinds import kind_of
from dqar_fx.graph.owners import is_size, owner_of, parameter_only


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of the model, as people and predicates see it.

    Attributes:
        index: position among the rewritten sites, in graph order; -1 for one that is left computing.
        path: module path, e.g. ``transformer_blocks.3.attn1``; "" where no module owns the attention.
        kind: ``"self"``, ``"cross"`` or ``"joint"``.
        owner: class name of the owning module, "" where there is none.
        exits: names of the graph values that leave the attention.
        shapes: their shapes, as captured (a dimension may be symbolic).
        heads: number of heads of the (first) attention, or None where it cannot be read off.
        reason: why the site is left computing; "" when it is rewritten.
        lossless: its value follows from parameters and from what a generation is conditioned on alone, so it is
            computed once, and reused at every step after the first (``CacheConfig.lossless``).
    """

    index: int
    path: str
    kind: str
    owner: str
    exits: tuple[str, ...]
    shapes: tuple[tuple[object, ...], ...]
    heads: int | None
    reason: str = ""
    lossless: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """A site together with its place in the graph (nodes by name, so that it survives a fork).

    ``batch`` is the size of the attention's batch dimension, None where it cannot be read off. ``sizes`` are numbers
    that something outside reads and that follow from the sizes of the exits, with the numbers they are made of.
    ``roles`` say of each exit whether it is the attention's ``"key"``, its ``"value"`` or ``"both"``: then only what
    the attention reads is routed (see ``keys_values``). Empty where the exits are what leaves the attention.
    ``key`` tells the site from all others of the graph: its path, with a number where several share one.
    """

    site: Site
    attentions: tuple[str, ...]
    exits: tuple[str, ...]
    inside: frozenset[str]
    batch: object = None
    sizes: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    key: str = ""


def find_sites(gm: fx.GraphModule) -> list[Region]:
    """All attentions of a Dynamo graph in graph order, those that cannot be rewritten included (with their reason).

    Expects ``meta["example_value"]`` and ``meta["nn_module_stack"]`` as Dynamo leaves them; changes nothing.
    """
    nodes = list(gm.graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    parameters = parameter_only(nodes)
    stacks = {node: module_stack(node) for node in nodes}
    calls: dict[str, set[fx.Node]] = {}
    for node, stack in stacks.items():
        for call in stack:
            calls.setdefault(call.key, set()).add(node)
    last_of_written = _written_out(stacks, calls, parameters)
    cores = {n for n in nodes if is_attention(n) or n in last_of_written}
    owners: dict[fx.Node, tuple[ModuleCall | None, set[fx.Node]]] = {}
    for node in (n for n in nodes if n in cores):
        owner, inside = owner_of(node, stacks[node], calls, cores, parameters)
        if owner or last_of_written.get(node, True):  # what no module owns leaves by its last product
            owners[node] = owner, inside
    regions: list[Region] = []
    seen: set[fx.Node] = set()
    for node in nodes:
        if node in seen or (node not in owners and not is_fused_layer(node)):
            continue
        path = next((call.path for call in reversed(stacks[node])), "")
        if is_fused_layer(node):
            regions.append(_fused_layer(node, path))
            continue
        # Where the owner of one attention holds another one too, both are one site: regions never nest.
        around = [(owner, inside) for owner, inside in owners.values() if owner and node in inside]
        owner, inside = max(around, key=lambda o: len(o[1]), default=owners[node])
        mine = [n for n in nodes if n in cores and n in inside] if owner else [node]
        seen.update(mine)
        regions.append(_region(owner, owner.path if owner else path, inside, mine, order))
    return regions


def _written_out(
    stacks: dict[fx.Node, tuple[ModuleCall, ...]], calls: dict[str, set[fx.Node]], parameters: set[fx.Node]
) -> dict[fx.Node, bool]:
    """The nodes of attentions that are written out in a module that calls itself one; True for the last of each."""
    found: dict[fx.Node, bool] = {}
    named = {call.key: call for stack in stacks.values() for call in stack if calls_itself_attention(call)}
    for key in sorted(named, key=lambda k: len(calls[k])):  # the innermost module decides
        inside = calls[key]
        if any(is_attention(node) for node in inside):
            continue
        mine = written_out(inside, parameters)
        for node in mine:
            found.setdefault(node, not (depending_on([node], inside) & mine) - {node})
    return found


def _fused_layer(node: fx.Node, path: str) -> Region:
    reason = (
        f"torch made one operator of the whole layer, its residual included ({node.name}); with "
        f"torch.backends.mha.set_fastpath_enabled(False) it stays an attention that can be reused"
    )
    return Region(Site(-1, path, "self", "", (), (), None, reason), (node.name,), (), frozenset({node.name}))


def _region(
    owner: ModuleCall | None, path: str, inside: set[fx.Node], attentions: list[fx.Node], order: dict[fx.Node, int]
) -> Region:
    inside = set(inside)
    after = depending_on(attentions, inside)
    exits: list[fx.Node] = []
    for node in sorted(after, key=order.__getitem__):
        for exit_node in _exits_of(node, inside):
            if exit_node not in exits:
                exits.append(exit_node)
                inside.add(exit_node)
    numbers = {n for n in exits if is_size(n)}
    exits = [n for n in exits if n not in numbers]
    sizes = sorted(_made_of_numbers(numbers, inside), key=order.__getitem__)
    reason = _refusal(exits, sizes, inside, order)
    parts = roles(attentions, inside)
    site = Site(
        index=-1,
        path=path,
        kind=kind_of(parts, exits, inside, bool(owner)),
        owner=owner.type_name if owner else "",
        exits=tuple(n.name for n in exits),
        shapes=tuple(tuple(n.meta["example_value"].shape) for n in exits if not reason),
        heads=parts.heads,
        reason=reason,
    )
    names = frozenset(n.name for n in inside)
    return Region(site, tuple(n.name for n in attentions), site.exits, names, parts.batch, tuple(n.name for n in sizes))


def _made_of_numbers(numbers: set[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """``numbers``, and the numbers inside that they are made of."""
    found: set[fx.Node] = set()
    pending = list(numbers)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [a for a in node.all_input_nodes if a in inside and is_size(a)]
    return found


def _exits_of(node: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """``node`` if something outside reads it; its items if it is a tuple that is taken apart outside."""
    outside = [u for u in node.users if u not in inside]
    if not outside:
        return []
    value = node.meta.get("example_value")
    if isinstance(value, (tuple, list)) and all(u.target is operator.getitem for u in outside):
        return outside
    return [node]


def _refusal(exits: list[fx.Node], sizes: list[fx.Node], inside: set[fx.Node], order: dict[fx.Node, int]) -> str:
    """Why the region cannot be skipped, or ""."""
    if not exits:
        return "its value is never used"
    for node in exits:
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor):
            return f"its exit {node.name} is {type(value).__name__}, not a tensor"
        if not value.is_floating_point():
            return f"its exit {node.name} has dtype {value.dtype}; only floating point can be stored"
        if value.ndim < 2:
            return f"its exit {node.name} has {value.ndim} dimension(s); at least 2 are needed"
    for node in sizes:
        hidden = [a.name for a in node.all_input_nodes if a in inside and a not in sizes and a not in exits]
        if hidden:
            return f"the number {node.name}, which is read outside, is read off {hidden[0]}, which is not"
    outer = frozenset().union(*(storages(a) for n in inside for a in n.all_input_nodes if a not in inside))
    for node in inside:
        for target in written(node):
            if target not in inside or storages(target) & outer:
                return f"{node.name} writes in place into {target.name}, which lives outside of the attention"
    memory = frozenset().union(*map(storages, exits))
    last = max(order[n] for n in (*exits, *writers(inside, memory)))
    for node in (*exits, *sizes):
        early = [u.name for u in node.users if u not in inside and order[u] < last]
        if early:
            return f"{early[0]} reads the exit {node.name} before the attention is complete"
    # Read back, exits no longer share memory: a write into one would not show in the other.
    for i, node in enumerate(exits):
        shared = storages(node) & frozenset().union(*(storages(n) for n in exits[:i]))
        late = [n.name for n in writers(order, shared) if order[n] > last]
        if late:
            return f"{late[0]} writes in place into the exit {node.name}, which shares memory with another exit"
    return ""
