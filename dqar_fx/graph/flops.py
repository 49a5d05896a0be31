"""Floating-point operations of a captured graph, and how many of them vanish when attentions are read from the cache.

A multiply-add is two FLOP; only matrix products, convolutions and attentions count, as in ``torch.utils.flop_counter``,
whose formulas these are.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dqar_fx.config import CacheConfig
from dqar_fx.graph.capture import fork
from dqar_fx.graph.effects import asserts, changes_mode, finds_size, has_late_size
from dqar_fx.graph.lossless import Constant
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.owners import is_size
from dqar_fx.graph.sites import Region
from dqar_fx.graph.specialise import Outcome, Variant
from dqar_fx.runtime.cache import ExitSpec
from dqar_fx.runtime.program import CapturedGraph, Kind

_MARK = "dqar_flops"


def node_flops(gm: fx.GraphModule) -> dict[str, int]:
    """FLOP of each call node of a Dynamo graph, by name; a node that cannot be counted is left out.

    Each call is made once on meta tensors shaped like its example values, whatever the device of the model: on meta,
    ``scaled_dot_product_attention`` falls apart into its two products, for which there are formulas (there is none for
    the CPU's flash kernel). Equal calls are made once. A size that depends on values (``nonzero``) counts as the
    largest that it can be.
    """
    known: dict[Hashable, tuple[int, Any] | None] = {}
    late: dict[fx.Node, Any] = {}  # what has such a size, at its largest
    counts = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or changes_mode(node):
            continue  # a change of mode must not be made: it would outlive the count
        if asserts(node) or finds_size(node) or node.target in (operator.setitem, operator.getitem) or is_size(node):
            counts[node.name] = 0
        try:
            args, kwargs = _example(gm, node.args, late), _example(gm, node.kwargs, late)
        except _Unknown:
            args = None
        if args is None or asserts(node) or finds_size(node):
            with suppress(_Unknown):
                late[node] = _largest(node.meta.get("example_value"))
            continue
        key = (node.op, node.target, _signature(args), _signature(kwargs))
        if key not in known:
            known[key] = _count(node, args, kwargs)
        counted = known[key]
        if counted is not None:
            flops, result = counted
            counts.setdefault(node.name, flops)
            if has_late_size(node):
                late[node] = result
    return counts


class Work:
    """What one call of a model costs, under any choice of reusing sites.

    The count is made on the very pieces that the runtime would compile for that choice, so what falls away here is what
    falls away there: the attention, all that only feeds it, and what is shared by attentions that all reuse.

    Args:
        graphs: the graphs of one call, in order.
        regions: for each graph, the sites to rewrite.
        cache: how values are stored; storing and reading cost no FLOP in this count.
        constant: picks the inputs that stay the same during a generation; None to hoist nothing.

    Attributes:
        total: FLOP of a call that reuses nothing.
        uncounted: nodes for which there is no count, as ``name: target``.
    """

    def __init__(
        self,
        graphs: Sequence[fx.GraphModule],
        regions: Sequence[Sequence[Region]],
        cache: CacheConfig | None = None,
        constant: Constant | None = None,
    ) -> None:
        cache = cache or CacheConfig()
        lowerer = Lowerer(_never)
        variants: dict[object, Variant] = {}
        uncounted: list[str] = []
        marked: dict[int, fx.GraphModule] = {}
        for gm in graphs:
            if id(gm) not in marked:
                marked[id(gm)] = _mark(gm, uncounted)
        self.uncounted = tuple(uncounted)
        self.graphs = tuple(
            CapturedGraph(marked[id(gm)], own, cache, lowerer, variants, constant=constant)
            for gm, own in zip(graphs, regions, strict=True)
        )
        self.num_sites = sum(graph.num_sites for graph in self.graphs)
        self._known: dict[tuple[int, tuple[Outcome, ...], Kind], int] = {}
        self.total = self.of([False] * self.num_sites)

    def of(self, reused: Sequence[bool], *, hoisted: bool = False) -> int:
        """FLOP of a call in which the sites marked True are read and the others computed; one entry per site.

        ``hoisted``: the call is given what stays the same during a generation.
        """
        cost, first = 0, 0
        for index, graph in enumerate(self.graphs):
            mine = reused[first : first + graph.num_sites]
            first += graph.num_sites
            outcomes = tuple(Outcome.REUSE if r else Outcome.COMPUTE for r in mine)
            kind = Kind.GIVEN if hoisted and graph.hoisted is not None else Kind.PLAIN
            known = self._known.get((index, outcomes, kind))
            if known is None:
                known = self._known[index, outcomes, kind] = _program_flops(graph, outcomes, kind)
            cost += known
        return cost

    def site_savings(self) -> list[int]:
        """For each site the FLOP that vanish if it, and it alone, reuses."""
        return [self.total - self.of([i == site for i in range(self.num_sites)]) for site in range(self.num_sites)]

    def saved_together(self) -> int:
        """The FLOP that vanish if every site reuses."""
        return self.total - self.of([True] * self.num_sites)

    def site_bytes(self) -> list[int]:
        """For each site the bytes that its stored value takes, scales included, as the cache is configured."""
        return [sum(map(_nbytes, specs)) for specs in self._specs()]

    def native_bytes(self) -> list[int]:
        """For each site the bytes that its stored value would take in the model's own dtype."""
        return [sum(prod(spec.shape) * spec.layout.dtype.itemsize for spec in specs) for specs in self._specs()]

    def _specs(self) -> list[list[ExitSpec]]:
        return [specs for graph in self.graphs for specs in graph.specs(())]  # captured for one shape: no size is open


def site_savings(gm: fx.GraphModule, regions: Sequence[Region]) -> list[int]:
    """``Work.site_savings`` of a model that is one graph."""
    return Work([gm], [regions]).site_savings()


def speedup_bound(total: int, saved: Sequence[int]) -> float:
    """How much faster a generation can get at most, if time went by FLOP: ``1 / (1 - mean(saved) / total)``.

    Args:
        total: FLOP of a call that reuses nothing.
        saved: for each step, the FLOP that its call saves.
    """
    left = total * len(saved) - sum(saved)
    return total * len(saved) / left if left > 0 else float("inf")


def _mark(gm: fx.GraphModule, uncounted: list[str]) -> fx.GraphModule:
    """A copy whose nodes carry their FLOP in ``meta``, where every later pass hands it on."""
    marked = fork(gm)
    counts = node_flops(gm)
    for node in marked.graph.nodes:
        if node.op in ("call_function", "call_method"):
            if node.name in counts:
                # With the target: a node that a pass puts in the place of another takes over its meta, not its work.
                node.meta[_MARK] = (node.target, counts[node.name])
            elif not changes_mode(node):
                uncounted.append(f"{node.name}: {getattr(node.target, '__name__', node.target)}")
    return marked


def _program_flops(graph: CapturedGraph, outcomes: tuple[Outcome, ...], kind: Kind) -> int:
    program = graph.build(outcomes, kind)
    return sum(
        flops
        for step in program.steps
        for node in step.variant.gm.graph.nodes
        for target, flops in [node.meta.get(_MARK, (None, 0))]
        if target is node.target
    )


def _nbytes(spec: ExitSpec) -> int:
    parts = replace(spec, device=torch.device("meta")).allocate()
    return sum(part.numel() * part.element_size() for part in parts)


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is compiled here")


class _Unknown(Exception):
    """What an argument looks like is not known, or a size of it has no largest value."""


def _count(node: fx.Node, args: Any, kwargs: Any) -> tuple[int, Any] | None:
    """The FLOP of a call, and what it returns (on meta tensors); None if it cannot be made."""
    try:
        formula = flop_registry.get(node.target)
        if formula is not None:  # a higher-order operator, which cannot be called on its own
            return int(formula(*args, **kwargs, out_val=None)), None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target is callable
    except Exception:  # whatever an operator raises on meta tensors: the node is reported, not guessed
        return None
    return int(counter.get_total_flops()), result


def _example(gm: fx.GraphModule, value: Any, late: Mapping[fx.Node, Any]) -> Any:
    """An argument with every node replaced by a meta tensor like its example value."""
    if isinstance(value, fx.Node):
        if value in late:
            return late[value]
        if value.op == "get_attr" and "example_value" not in value.meta:
            return gm.get_submodule(str(value.target))
        if "example_value" not in value.meta or has_late_size(value):
            raise _Unknown
        return _on_meta(value.meta["example_value"])
    if isinstance(value, slice):
        return slice(*(_example(gm, v, late) for v in (value.start, value.stop, value.step)))
    if isinstance(value, (tuple, list)):
        items = [_example(gm, v, late) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: _example(gm, v, late) for k, v in value.items()}
    return _on_meta(value)


def _on_meta(value: Any) -> Any:
    """The same without data, every symbol replaced by a number."""
    if isinstance(value, torch.Tensor):
        return _empty([hint(s) for s in value.shape], [hint(s) for s in value.stride()], value.dtype)
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, torch.Size):
        return torch.Size(map(hint, value))
    if isinstance(value, (tuple, list)):
        items = [_on_meta(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: _on_meta(v) for k, v in value.items()}
    return hint(value)


def _empty(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _largest(value: Any) -> Any:
    """The largest that a value may be whose size depends on values; dense, if it is a tensor."""
    if isinstance(value, torch.Tensor):
        return torch.empty([_largest(s) for s in value.shape], dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(map(_largest, value))
    if isinstance(value, torch.SymInt):
        bound = value.node.shape_env.bound_sympy(value.node.expr).upper
        if not bound.is_Integer:
            raise _Unknown
        return int(bound)
    return value


def hint(value: Any) -> Any:
    """A number in place of a symbolic one."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    if value.node.hint is not None:
        return value.node.hint
    # A size that was found, and that can be but one, has no hint: its expression is that number.
    return bool(value.node.expr) if isinstance(value, torch.SymBool) else int(value.node.expr)


def _signature(value: Any) -> Hashable:
    """Equal for arguments that give the same count: shapes, strides and dtypes in place of tensors."""
    if isinstance(value, torch.Tensor):
        return (*value.shape, *value.stride(), value.dtype)
    if isinstance(value, torch.nn.Module):
        return id(value)  # the body of a higher-order operator
    if isinstance(value, (tuple, list)):
        return (type(value), *(_signature(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _signature(v)) for k, v in value.items())
    return repr(value)
