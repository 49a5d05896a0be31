"""May a captured graph be recorded once and launched again as it was? What a recording would get wrong is found here.

A recording (a CUDA graph) repeats kernels with the arguments they had: the same addresses, and the same numbers where
an argument came from the host. Nothing that the host does in between happens again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from dqar_fx.graph.attentions import is_attention
from dqar_fx.graph.capture import is_parameter, source_name
from dqar_fx.graph.effects import finds_size, has_late_size, storages, target_name, tensors_of, written

#: Higher-order operators whose bodies are compiled into kernels; of any other the host may choose what runs.
_KERNELS = frozenset({"flex_attention", "triton_kernel_wrapper_mutation", "triton_kernel_wrapper_functional"})


def why_not_recordable(gm: fx.GraphModule, device: str) -> str:
    """Why ``gm``, as Dynamo captured it, cannot be recorded; "" if it can.

    It can where everything happens on one device of the kind ``device`` ("cuda"), in an order and of sizes that follow
    from the graph alone, without randomness; where what it is given is not written into (its own state may be); and
    where each result is memory of its own, so that a copy is as good.
    """
    return next(_reasons(gm, device), "")


def _reasons(gm: fx.GraphModule, device: str) -> Iterator[str]:
    nodes = [n for n in gm.graph.nodes if n.op != "output" and (n.users or n.op != "placeholder")]
    places: dict[torch.device, fx.Node] = {}
    for node in nodes:
        if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
            yield f"{_name(node)} is a number that changes: pass a tensor on the device"
        for tensor in tensors_of(node.meta.get("example_value")):
            places.setdefault(tensor.device, node)
    for place, node in places.items():
        if place.type != device:
            where = "the host" if place.type == "cpu" else place.type
            yield f"{_name(node)} is on {where}"
    if len(places) > 1:
        yield f"it runs on several devices ({', '.join(sorted(map(str, places)))})"
    for node in nodes:
        if finds_size(node) or has_late_size(node):
            yield f"{_name(node)} has a size that is known only when it runs"
        if node.op not in ("call_function", "call_method"):
            continue
        if _is_random(node):
            yield f"{_name(node)} is random"
        if isinstance(node.target, torch._ops.HigherOrderOperator) and target_name(node) not in _KERNELS:
            yield f"{_name(node)} may choose on the host what runs"
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace.startswith("_c10d"):
            yield f"{_name(node)} talks to other processes"
    arguments = {storage: n for n in nodes if n.op == "placeholder" and not is_parameter(n) for storage in storages(n)}
    for node in nodes:
        for target in written(node):
            for storage in storages(target) & arguments.keys():
                yield f"it writes into {_name(arguments[storage])}"
    yield from _shared_results(gm)


def _shared_results(gm: fx.GraphModule) -> Iterator[str]:
    """Results that are views of what was given, or of each other."""
    taken: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            taken.update(dict.fromkeys(storages(node), node))
    result = next(n for n in gm.graph.nodes if n.op == "output")
    for node in dict.fromkeys(n for n in cast(tuple[Any, ...], result.args[0]) if isinstance(n, fx.Node)):
        for storage in storages(node) & taken.keys():
            yield f"it returns {_name(node)}, which shares its memory with {_name(taken[storage])}"
        taken.update(dict.fromkeys(storages(node), node))


def _is_random(node: fx.Node) -> bool:
    """True for a call that draws random numbers. Dropout and attention's own were refused if they were active."""
    name = target_name(node)
    if name in ("dropout", "dropout_") or is_attention(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    packet = getattr(torch.ops.aten, name, None)
    return isinstance(packet, torch._ops.OpOverloadPacket) and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()  # type: ignore[no-untyped-call]  # torch's own
    )


def _name(node: fx.Node) -> str:
    return source_name(node) or node.name
