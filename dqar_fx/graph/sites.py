"""Find the attentions of a captured graph, who owns them, and where their value leaves.

A *site* is one attention as its model's author wrote it: usually a module with projections around
``scaled_dot_product_attention``. Storing what leaves that module saves the most, since everything that only feeds it
(norm, modulation, Q, K, V, the product, the out-projection) is dead once the stored value is read. Nothing here knows a
model by name; three questions about the graph decide:

* Does a module own the attention? Innermost first: a module that has parameters and either calls itself an attention
  or lets nothing but parameters past the attention to its output. A module that adds its own input back to the result
  is a *block*, not an attention: caching it would freeze the residual stream.
* If none does (the product stands in the block's own forward), follow the value through everything that mixes it with
  parameters only (reshape, out-projection, dropout) and stop before the first mix with another activation (the gate,
  the residual).
* Can the region be skipped? Not if it writes in place into something outside.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dqar_fx.graph.capture import ModuleCall, is_parameter, module_stack
from dqar_fx.graph.effects import closure_forward, storages, target_name, written

ATTENTION = torch._C._nn.scaled_dot_product_attention
_ATTENTION_OPS = ("scaled_dot_product_attention",)
_NAMED = ("attention", "attn")
#: Operations through which a tensor stays "the same value" when we look for a residual connection.
_SAME_VALUE = frozenset(
    "to type_as float half bfloat16 double contiguous clone view reshape flatten unflatten squeeze unsqueeze permute "
    "transpose dropout alias expand".split()
)


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
    """

    index: int
    path: str
    kind: str
    owner: str
    exits: tuple[str, ...]
    shapes: tuple[tuple[object, ...], ...]
    heads: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """A site together with its place in the graph (nodes by name, so that it survives a fork)."""

    site: Site
    attentions: tuple[str, ...]
    exits: tuple[str, ...]
    inside: frozenset[str]


def is_attention(node: fx.Node) -> bool:
    """True for a ``scaled_dot_product_attention`` node, whichever form Dynamo left it in."""
    return node.op == "call_function" and target_name(node).split(".")[0] in _ATTENTION_OPS


def find_sites(gm: fx.GraphModule) -> list[Region]:
    """All attentions of a Dynamo graph in graph order, those that cannot be rewritten included (with their reason).

    Expects ``meta["example_value"]`` and ``meta["nn_module_stack"]`` as Dynamo leaves them; changes nothing.
    """
    nodes = list(gm.graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    parameters = _parameter_only(nodes)
    stacks = {node: module_stack(node) for node in nodes}
    calls: dict[str, set[fx.Node]] = {}
    for node, stack in stacks.items():
        for call in stack:
            calls.setdefault(call.key, set()).add(node)
    regions: list[Region] = []
    seen: set[fx.Node] = set()
    for node in nodes:
        if not is_attention(node) or node in seen:
            continue
        owner, inside = _owner(node, stacks[node], calls, parameters)
        attentions = [n for n in nodes if n in inside and is_attention(n)] if owner else [node]
        seen.update(attentions)
        path = owner.path if owner else next((call.path for call in reversed(stacks[node])), "")
        regions.append(_region(owner, path, inside, attentions, order))
    return regions


def _parameter_only(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose value depends on nothing but parameters and constants of the module."""
    fixed: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            if is_parameter(node) or not storages(node):  # a size is no activation
                fixed.add(node)
        elif node.op == "get_attr" or (node.op != "output" and all(a in fixed for a in node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _owner(
    attention: fx.Node, stack: tuple[ModuleCall, ...], calls: dict[str, set[fx.Node]], parameters: set[fx.Node]
) -> tuple[ModuleCall | None, set[fx.Node]]:
    """The module call that owns ``attention`` and its nodes, or (None, the nodes that only re-shape its value)."""
    for call in reversed(stack):
        inside = calls[call.key]
        attentions = [n for n in inside if is_attention(n)]
        after = closure_forward(attentions, inside)
        if _has_residual(inside, after):
            break  # a block, and so is everything around it
        named = any(word in call.type_name.lower() for word in _NAMED) or any(
            word in call.path.rpartition(".")[2].lower() for word in _NAMED
        )
        if not named and not _dominates(attentions, inside, after, parameters):
            continue
        if any(a in parameters for n in inside for a in n.all_input_nodes):
            return call, inside
    return None, _value_only(attention, parameters)


def _has_residual(inside: set[fx.Node], after: set[fx.Node]) -> bool:
    """True when the module adds a value that came from outside, unchanged, to the attention's result."""
    for node in after:
        if target_name(node) not in ("add", "add_", "iadd") or is_attention(node):
            continue
        for argument in node.all_input_nodes:
            source = argument
            while source in inside and source not in after and target_name(source) in _SAME_VALUE:
                source = source.all_input_nodes[0]
            if source not in inside and not is_parameter(source):
                return True
    return False


def _dominates(
    attentions: list[fx.Node], inside: set[fx.Node], after: set[fx.Node], parameters: set[fx.Node]
) -> bool:
    """True when, from the attention on, the module mixes its value with nothing but parameters."""
    return all(
        argument in after or argument in parameters
        for node in after
        if node not in attentions
        for argument in node.all_input_nodes
    )


def _value_only(attention: fx.Node, parameters: set[fx.Node]) -> set[fx.Node]:
    """``attention`` and what follows it for as long as only parameters are mixed in; one value at a time."""
    inside = {attention}
    node = attention
    while True:
        users = [u for u in node.users if u not in parameters]
        if len(users) != 1 or users[0].op == "output" or is_attention(users[0]) or written(users[0]):
            return inside
        node = users[0]
        if any(a not in inside and a not in parameters for a in node.all_input_nodes):
            return inside
        if not isinstance(node.meta.get("example_value"), torch.Tensor):
            return inside
        inside.add(node)


def _region(
    owner: ModuleCall | None, path: str, inside: set[fx.Node], attentions: list[fx.Node], order: dict[fx.Node, int]
) -> Region:
    inside = set(inside)
    after = closure_forward(attentions, inside)
    exits: list[fx.Node] = []
    for node in sorted(after, key=order.__getitem__):
        for exit_node in _exits_of(node, inside):
            if exit_node not in exits:
                exits.append(exit_node)
                inside.add(exit_node)
    reason = _refusal(exits, inside, order)
    site = Site(
        index=-1,
        path=path,
        kind=_kind(attentions, exits, inside, bool(owner)),
        owner=owner.type_name if owner else "",
        exits=tuple(n.name for n in exits),
        shapes=tuple(tuple(n.meta["example_value"].shape) for n in exits if not reason),
        heads=_heads(attentions[0]),
        reason=reason,
    )
    names = frozenset(n.name for n in inside)
    return Region(site, tuple(n.name for n in attentions), site.exits, names)


def _exits_of(node: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """``node`` if something outside reads it; its items, if it is a tuple that is taken apart outside."""
    outside = [u for u in node.users if u not in inside]
    if not outside:
        return []
    value = node.meta.get("example_value")
    if isinstance(value, (tuple, list)) and all(u.target is operator.getitem for u in outside):
        return outside
    return [node] if isinstance(value, torch.Tensor) or value is None else []


def _refusal(exits: list[fx.Node], inside: set[fx.Node], order: dict[fx.Node, int]) -> str:
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
    outside_storages = frozenset().union(
        *(storages(a) for n in inside for a in n.all_input_nodes if a not in inside),
    )
    for node in inside:
        for target in written(node):
            if target not in inside or storages(target) & outside_storages:
                return f"{node.name} writes in place into {target.name}, which lives outside of the attention"
    last = max(order[n] for n in exits)
    for node in exits:
        early = [u.name for u in node.users if u not in inside and order[u] < last]
        if early:
            return f"{early[0]} reads the exit {node.name} before the attention is complete"
    return ""


def _heads(attention: fx.Node) -> int | None:
    query = _argument(attention, 0, "query")
    value = query.meta.get("example_value") if isinstance(query, fx.Node) else None
    return int(value.shape[-3]) if isinstance(value, torch.Tensor) and value.ndim >= 4 else None


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _kind(attentions: list[fx.Node], exits: list[fx.Node], inside: set[fx.Node], bounded: bool) -> str:
    """``joint`` if two streams leave or keys see more than queries, ``cross`` if keys come from elsewhere, else ``self``."""
    if len(exits) > 1:
        return "joint"
    query, key = (_argument(attentions[0], i, name) for i, name in enumerate(("query", "key")))
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return "self"
    stop: Callable[[fx.Node], bool] = (lambda n: n not in inside) if bounded else (lambda n: n.op == "placeholder")
    from_query, from_key = _sources(query, stop), _sources(key, stop)
    if not from_query <= from_key:
        return "cross"
    return "joint" if from_key - from_query and _length(query) != _length(key) else "self"


def _sources(node: fx.Node, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The activations (not parameters) that ``node`` is made of, where ``stop`` ends the search."""
    found: set[fx.Node] = set()
    visited: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in visited:
            continue
        visited.add(current)
        if current.op == "placeholder" or stop(current):
            if not is_parameter(current):
                found.add(current)
        else:
            pending.extend(current.all_input_nodes)
    return found


def _length(node: fx.Node) -> object:
    value = node.meta.get("example_value")
    return value.shape[-2] if isinstance(value, torch.Tensor) and value.ndim >= 2 else None
