"""Which nodes of a captured graph attend: fused operators, and attentions that are written out in products.

A *fused* attention is one operator that takes queries, keys and values: ``scaled_dot_product_attention``, the function
behind ``torch.nn.MultiheadAttention``, ``flex_attention``, or a kernel that somebody registered under a name that says
so. Everything else that mixes tokens is *written out*: two products of activations, the second of which reads the
first (``softmax(q k') v``, ``q (k' v)``, gated delta rules, ...). Products alone prove little, so these count only in
a module that calls itself an attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dqar_fx.graph.capture import ModuleCall
from dqar_fx.graph.effects import depending_on, target_name, tensors_of

#: In the name of a module's class, at the end of its path, or in the name of an operator: it says that it attends.
NAMED = ("attention", "attn")
#: In the name of an operator that only prepares an attention.
_NOT_NAMED = ("mask", "choice", "prepare")
_MULTI_HEAD = ("multi_head_attention_forward", "_native_multi_head_attention")
#: One operator for a whole layer, residual and feed-forward included: there is no attention left to take out of it.
_FUSED_LAYERS = ("_transformer_encoder_layer_fwd",)
#: Products of two tensors, and where among the arguments these stand (``baddbmm`` adds its first one).
_PRODUCTS = {
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm", "tensordot", "linalg_matmul"), slice(0, 2)),
    **dict.fromkeys(("baddbmm", "baddbmm_", "addbmm", "addmm"), slice(1, 3)),
    "einsum": slice(1, None),
}
_WEIGHTS = ("softmax", "special_softmax", "_softmax", "_safe_softmax")


def attends(function: object) -> bool:
    """True for an operator that is an attention by its name."""
    name = (function if isinstance(function, str) else getattr(function, "__name__", str(function))).split(".")[0]
    return any(word in name for word in NAMED) and not any(word in name for word in _NOT_NAMED)


def is_attention(node: fx.Node) -> bool:
    """True for a fused attention, whichever form Dynamo left it in.

    It says what it is, takes queries, keys and values (one of them packed, at least), and returns activations.
    """
    if node.op != "call_function" or not attends(target_name(node)):
        return False
    given = [_tensor(node, position, name) for position, name in enumerate(("query", "key", "value"))]
    enough = all(map(_is_activation, given)) or ("packed" in target_name(node) and _is_activation(given[0]))
    return enough and _is_activation(node)


def _is_activation(node: fx.Node | None) -> bool:
    tensor = next(tensors_of(node.meta.get("example_value")), None) if node is not None else None
    return tensor is not None and tensor.is_floating_point()


def is_fused_layer(node: fx.Node) -> bool:
    """True for an operator that holds an attention together with the residual around it."""
    return node.op == "call_function" and target_name(node) in _FUSED_LAYERS


def keys_and_values(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a fused attention attends over, as it stands; None where that is made inside of the operator, or packed."""
    if not is_attention(node) or target_name(node) in _MULTI_HEAD:
        return None
    key, value = _tensor(node, 1, "key"), _tensor(node, 2, "value")
    return (key, value) if key is not None and value is not None else None


def attend_over(node: fx.Node, key: fx.Node, value: fx.Node) -> None:
    """Hand other keys and values to a fused attention; a query that is the same tensor as they were stays."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, name, given in ((1, "key", key), (2, "value", value)):
        if position < len(args):
            args[position] = given
        else:
            kwargs[name if name in kwargs else name[0]] = given
    node.args, node.kwargs = tuple(args), kwargs


def query_of(node: fx.Node) -> fx.Node | None:
    """The queries of a fused attention."""
    return _tensor(node, 0, "query")


def attend_with(node: fx.Node, query: fx.Node) -> None:
    """Hand other queries to a fused attention; keys and values that are the same tensor stay."""
    if node.args:
        node.args = (query, *node.args[1:])
    else:
        node.kwargs = {**node.kwargs, "query" if "query" in node.kwargs else "q": query}


def dropout_probability(node: fx.Node) -> float:
    """With which probability a fused attention drops weights at this call; 0 where it does not, or does not say."""
    if target_name(node).startswith("scaled_dot_product_attention"):
        p, training = argument(node, 4, "dropout_p", 0.0), True
    elif target_name(node) == _MULTI_HEAD[0]:
        p, training = argument(node, 10, "dropout_p", 0.0), bool(argument(node, 13, "training", True))
    else:
        p, training = node.kwargs.get("dropout_p", 0.0), True
    return float(p) if training and isinstance(p, (int, float)) else 0.0


def calls_itself_attention(call: ModuleCall) -> bool:
    """True by the name of its class, or by the last part of its path."""
    return any(word in name.lower() for word in NAMED for name in (call.type_name, call.path.rpartition(".")[2]))


def written_out(inside: set[fx.Node], fixed: set[fx.Node]) -> set[fx.Node]:
    """The products (and softmaxes) of the attentions that are written out in ``inside``; empty if there is none.

    A product of two activations, or a softmax over one, that another product of two activations reads, on whatever way:
    the first weighs tokens by tokens (or sums ``k' v`` over them), the second applies it. A projection is no such
    product (one side is a parameter, which is in ``fixed``), a norm has none, and a single one (an outer product, a
    rotation of coordinates) is not enough.
    """
    products = {n for n in inside if is_product(n) and fixed.isdisjoint(_factors(n))}
    if not products:
        return set()
    found: set[fx.Node] = set()
    for start in inside:
        if start in products or (target_name(start) in _WEIGHTS and start not in fixed):
            ends = (depending_on([start], inside) & products) - {start}
            if ends:
                found |= {start, *ends}
    return found


def is_product(node: fx.Node) -> bool:
    """True for a call that multiplies two matrices."""
    called = node.op in ("call_function", "call_method") and target_name(node) in _PRODUCTS
    return called and len(list(_factors(node))) >= 2


def _factors(node: fx.Node) -> Iterator[fx.Node]:
    """What a product multiplies."""
    given = [*node.args, *node.kwargs.values()][_PRODUCTS[target_name(node)]]
    for value in given:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, fx.Node) and isinstance(item.meta.get("example_value"), torch.Tensor):
                yield item


@dataclass(frozen=True, slots=True)
class Roles:
    """What takes part in an attention, as far as the graph shows it.

    Attributes:
        query, key: the nodes, None where it is not known which they are.
        heads: how many, or None.
        batch: how many samples (the size of the batch dimension), or None.
        comparable: True if the lengths of ``query`` and ``key`` stand in their second dimension from the right.
    """

    query: fx.Node | None
    key: fx.Node | None
    heads: int | None
    batch: object
    comparable: bool


def roles(attentions: list[fx.Node], inside: set[fx.Node]) -> Roles:
    """The roles in the first fused attention of a site, or in the one that is written out."""
    fused = next((node for node in attentions if is_attention(node)), None)
    return _fused_roles(fused) if fused is not None else _written_roles(attentions, inside)


def _fused_roles(node: fx.Node) -> Roles:
    query, key = _tensor(node, 0, "query"), _tensor(node, 1, "key")
    shape = _shape(query)
    heads: object = None
    batch = shape[0] if shape else None
    if target_name(node) in _MULTI_HEAD:
        heads = argument(node, 4, "num_heads", argument(node, 4, "num_head"))
        if target_name(node) == _MULTI_HEAD[0]:  # [tokens, samples, width]
            batch = shape[1] if len(shape) == 3 else None
    elif len(shape) >= 4 and heads_before_tokens(node):
        heads = shape[-3]
    return Roles(query, key, heads if isinstance(heads, int) else None, batch, comparable=True)


def heads_before_tokens(node: fx.Node) -> bool:
    """True for an operator that takes ``[B, ..., H, N, D]``; of others the layout is not known."""
    return target_name(node).startswith(("scaled_dot_product_attention", "flex_attention"))


def _written_roles(attentions: list[fx.Node], inside: set[fx.Node]) -> Roles:
    """``q k'`` then a softmax then ``... v``; or, without a softmax, ``v k'`` and then ``... q``."""
    first = next((n for n in attentions if target_name(n) in _PRODUCTS), None)
    if first is None:
        return Roles(None, None, None, None, comparable=False)
    shape = _shape(first)
    heads = shape[1] if len(shape) == 4 and target_name(first) != "einsum" else None
    after = depending_on([first], inside)
    query, key = list(_factors(first))[:2]
    if not any(target_name(n) in _WEIGHTS for n in after):
        applied = (n for n in attentions if n is not first and n in after and target_name(n) in _PRODUCTS)
        query = next((factor for n in applied for factor in _factors(n) if factor not in after), query)
    batch = shape[0] if shape else None
    return Roles(query, key, heads if isinstance(heads, int) else None, batch, comparable=False)


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument of a call, however it is given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _tensor(node: fx.Node, position: int, name: str) -> fx.Node | None:
    value = argument(node, position, name, node.kwargs.get(name[0]))
    return value if isinstance(value, fx.Node) else None


def _shape(node: fx.Node | None) -> tuple[object, ...]:
    value = node.meta.get("example_value") if node is not None else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
