"""Which module an attention belongs to, or, where it is written into a block's own forward, which nodes.

Two questions about the nodes of a module call decide: does the module add what it was given back to the result (then it
is a block, and what leaves it is the residual stream), and does anything but parameters get past its attention?
"""

from __future__ import annotations

import torch
from torch import fx

from dqar_fx.graph.attentions import calls_itself_attention, is_attention
from dqar_fx.graph.capture import ModuleCall, clean_path, is_parameter, source_name
from dqar_fx.graph.effects import depending_on, storages, target_name, written

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


def owner_of(
    attention: fx.Node,
    stack: tuple[ModuleCall, ...],
    calls: dict[str, set[fx.Node]],
    cores: set[fx.Node],
    parameters: set[fx.Node],
) -> tuple[ModuleCall | None, set[fx.Node]]:
    """The module call that owns ``attention`` and its nodes, or (None, the nodes that only re-shape its value)."""
    for call in reversed(stack):
        inside = calls[call.key]
        attentions = [n for n in inside if n in cores]
        after = depending_on(attentions, inside)
        if has_residual(inside, after, parameters):
            break  # a block, and so is everything around it
        if not calls_itself_attention(call) and not _dominates(attentions, after, parameters):
            continue
        if any(_is_own(a, call) for n in inside for a in n.all_input_nodes):
            return call, inside
    return None, value_only(attention, parameters)


def _is_own(node: fx.Node, call: ModuleCall) -> bool:
    """True for a parameter, or for a buffer of the module: a rotary table that it was handed makes it no owner."""
    if node.op != "placeholder" or not is_parameter(node):
        return False
    source = source_name(node)
    handed_on = "_buffers[" in source or (source and "_parameters[" not in source)
    return not handed_on or clean_path(source).startswith(call.path + ".")


def has_residual(inside: set[fx.Node], after: set[fx.Node], parameters: set[fx.Node]) -> bool:
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


def value_only(attention: fx.Node, parameters: set[fx.Node]) -> set[fx.Node]:
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


def parameter_only(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose value depends on nothing but parameters and constants of the module."""
    # A tensor that is made from nothing and written into later (`torch.empty(...).copy_(x)`) is no constant.
    rewritten = frozenset().union(*(storages(target) for node in nodes for target in written(node)))
    fixed: set[fx.Node] = set()
    for node in nodes:
        if storages(node) & rewritten:
            continue
        if node.op == "placeholder":
            if is_parameter(node) or is_size(node):
                fixed.add(node)
        elif (
            node.op == "get_attr"
            or is_size(node)
            or (node.op != "output" and all(a in fixed for a in node.all_input_nodes))
        ):
            fixed.add(node)
    return fixed


def is_size(node: fx.Node) -> bool:
    """True for a number or a shape: no activation, whatever it was read off."""
    value = node.meta.get("example_value")
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))
