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

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dqar_fx.graph.capture import ModuleCall, is_parameter, module_stack
from dqar_fx.graph.effects import closure_forward, storages, target_name, writers, written

ATTENTION = torch._C._nn.scaled_dot_product_attention
_ATTENTION_OPS = ("scaled_dot_product_attention",)
_NAMED = ("attention", "attn")
#: Operations through which a tensor stays "the same value" when we look for a residual connection.
_SAME_VALUE = frozenset(
    {"to", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "view", "reshape", "flatten"}
    | {"unflatten", "squeeze", "unsqueeze", "permute", "transpose", "dropout", "alias", "expand"}
)
#: Operations that add, and how many of their first arguments are the summands (the others are factors).
_SUMMANDS = {
    **dict.fromkeys(("add", "add_", "iadd", "__add__", "__iadd__", "sub", "sub_", "isub", "lerp", "lerp_"), 2),
    **dict.fromkeys(("addcmul", "addcmul_", "addmm", "addmm_", "baddbmm", "baddbmm_"), 1),
}


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
    attentions = [n for n in nodes if is_attention(n)]
    owners = {node: _owner(node, stacks[node], calls, parameters) for node in attentions}
    regions: list[Region] = []
    seen: set[fx.Node] = set()
    for node in attentions:
        if node in seen:
            continue
        # Where the owner of one attention holds another one too, both are one site: regions never nest.
        around = [(owner, inside) for owner, inside in owners.values() if owner and node in inside]
        owner, inside = max(around, key=lambda o: len(o[1]), default=owners[node])
        mine = [n for n in attentions if n in inside] if owner else [node]
        seen.update(mine)
        path = owner.path if owner else next((call.path for call in reversed(stacks[node])), "")
        regions.append(_region(owner, path, inside, mine, order))
    return regions


def _parameter_only(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose value depends on nothing but parameters and constants of the module."""
    # A tensor that is made from nothing and written into later (`torch.empty(...).copy_(x)`) is no constant.
    rewritten = frozenset().union(*(storages(target) for node in nodes for target in written(node)))
    fixed: set[fx.Node] = set()
    for node in nodes:
        if storages(node) & rewritten:
            continue
        if node.op == "placeholder":
            if is_parameter(node) or _is_size(node):
                fixed.add(node)
        elif (
            node.op == "get_attr"
            or _is_size(node)
            or (node.op != "output" and all(a in fixed for a in node.all_input_nodes))
        ):
            fixed.add(node)
    return fixed


def _is_size(node: fx.Node) -> bool:
    """True for a number or a shape: no activation, whatever it was read off."""
    value = node.meta.get("example_value")
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.Size))


def _owner(
    attention: fx.Node, stack: tuple[ModuleCall, ...], calls: dict[str, set[fx.Node]], parameters: set[fx.Node]
) -> tuple[ModuleCall | None, set[fx.Node]]:
    """The module call that owns ``attention`` and its nodes, or (None, the nodes that only re-shape its value)."""
    for call in reversed(stack):
        inside = calls[call.key]
        attentions = [n for n in inside if is_attention(n)]
        after = _after(attentions, inside)
        if _has_residual(inside, after, parameters):
            break  # a block, and so is everything around it
        named = any(word in call.type_name.lower() for word in _NAMED) or any(
            word in call.path.rpartition(".")[2].lower() for word in _NAMED
        )
        if not named and not _dominates(attentions, after, parameters):
            continue
        if any(a in parameters and not _is_size(a) for n in inside for a in n.all_input_nodes):
            return call, inside
    return None, _value_only(attention, parameters)


def _after(attentions: list[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """What depends on the attentions: as an argument, or through memory that something dependent writes into."""
    after = closure_forward(attentions, inside)
    while True:
        memory = frozenset().union(*(storages(target) for node in after for target in written(node)))
        more = {node for node in inside - after if storages(node) & memory}
        if not more:
            return after
        after = closure_forward(after | more, inside)


def _has_residual(inside: set[fx.Node], after: set[fx.Node], parameters: set[fx.Node]) -> bool:
    """True when the module adds a value that came from outside, unchanged, to the attention's result."""
    for node in after:
        summands = node.args[: _SUMMANDS.get(target_name(node), 0)]
        for source in summands:
            while source in inside and source not in after and target_name(source) in _SAME_VALUE:  # type: ignore[arg-type]
                source = source.all_input_nodes[0]  # type: ignore[union-attr]  # a node: it is in `inside`
            if isinstance(source, fx.Node) and source not in inside and source not in parameters:
                return True
    return False


def _dominates(attentions: list[fx.Node], after: set[fx.Node], parameters: set[fx.Node]) -> bool:
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
    while len(node.users) == 1:
        node = next(iter(node.users))
        if (
            node.op == "output"
            or is_attention(node)
            or written(node)
            or not isinstance(node.meta.get("example_value"), torch.Tensor)
            or any(a not in inside and a not in parameters for a in node.all_input_nodes)
        ):
            break
        inside.add(node)
    return inside


def _region(
    owner: ModuleCall | None, path: str, inside: set[fx.Node], attentions: list[fx.Node], order: dict[fx.Node, int]
) -> Region:
    inside = set(inside)
    after = _after(attentions, inside)
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
    """``node`` if something outside reads it; its items if it is a tuple that is taken apart outside."""
    outside = [u for u in node.users if u not in inside]
    if not outside:
        return []
    value = node.meta.get("example_value")
    if isinstance(value, (tuple, list)) and all(u.target is operator.getitem for u in outside):
        return outside
    return [node]


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
    outer = frozenset().union(*(storages(a) for n in inside for a in n.all_input_nodes if a not in inside))
    for node in inside:
        for target in written(node):
            if target not in inside or storages(target) & outer:
                return f"{node.name} writes in place into {target.name}, which lives outside of the attention"
    memory = frozenset().union(*map(storages, exits))
    last = max(order[n] for n in (*exits, *writers(inside, memory)))
    for node in exits:
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


def _heads(attention: fx.Node) -> int | None:
    query = _argument(attention, 0, "query")
    value = query.meta.get("example_value") if isinstance(query, fx.Node) else None
    return int(value.shape[-3]) if isinstance(value, torch.Tensor) and value.ndim >= 4 else None


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _kind(attentions: list[fx.Node], exits: list[fx.Node], inside: set[fx.Node], bounded: bool) -> str:
    """``joint``: two streams leave, or there are more keys than queries; ``cross``: keys are of another stream."""
    if len(exits) > 1:
        return "joint"
    query, key = (_argument(attentions[0], i, name) for i, name in enumerate(("query", "key")))
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return "self"
    stop: Callable[[fx.Node], bool] = (lambda n: n not in inside) if bounded else (lambda n: n.op == "placeholder")
    from_query, from_key = _sources(query, stop), _sources(key, stop)
    if not from_query <= from_key:
        return "cross"
    longer = from_key - from_query and _length(query) != _length(key)
    return "joint" if longer or _joins_streams(query, inside) else "self"


def _joins_streams(query: fx.Node, inside: set[fx.Node]) -> bool:
    """True if the module puts queries of two streams end to end (the last block of SD3 drops the text's output)."""
    for node in _ancestors(query, lambda n: n not in inside):
        if node not in inside or target_name(node) not in ("cat", "concat", "concatenate"):
            continue  # outside it may be anything, such as the two halves of a rotary table
        if node.args and isinstance(node.args[0], (tuple, list)):
            parts = [_sources(n, lambda n: n not in inside) for n in node.args[0] if isinstance(n, fx.Node)]
            if any(not a <= b and not b <= a for a, b in itertools.combinations(parts, 2)):
                return True
    return False


def _sources(node: fx.Node, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The activations (not parameters) that ``node`` is made of, where ``stop`` ends the search."""
    ends = {n for n in _ancestors(node, stop) if n.op == "placeholder" or stop(n)}
    return {n for n in ends if not is_parameter(n) and not _is_size(n)}


def _ancestors(node: fx.Node, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """``node`` and what it is made of, up to and including where ``stop`` ends the search."""
    visited: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in visited:
            visited.add(current)
            if not stop(current):
                pending.extend(current.all_input_nodes)
    return visited


def _length(node: fx.Node) -> object:
    value = node.meta.get("example_value")
    return value.shape[-2] if isinstance(value, torch.Tensor) and value.ndim >= 2 else None
