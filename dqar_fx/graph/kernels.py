"""The kernels that Inductor makes of the rewritten pieces: generated and counted, neither compiled nor run.

That takes no device. On fake tensors of ``mps``, Inductor's Metal code generator lowers the pieces, on those of ``cpu``
the one for C++, and on those of ``cuda``, where triton is installed, the one for Triton.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dqar_fx.config import CacheConfig
from dqar_fx.graph.elsewhere import like, moved, pretending
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lower import Lowerer, resolve_backend
from dqar_fx.graph.measure import DIFFERENCE_ROW, ROW
from dqar_fx.graph.specialise import COMPARED, DIFFERENCE, LENT, MEASUREMENTS, Outcome, Variant
from dqar_fx.runtime.cache import ExitSpec
from dqar_fx.runtime.program import CapturedGraph

#: What an outcome is at a site that cannot be compared with another branch's.
_ALONE = {compared: outcome for outcome, compared in COMPARED.items()}
OUTCOMES = (Outcome.COMPUTE, Outcome.STORE, Outcome.REUSE)

#: ``name = async_compile.metal('name', '''source''', ...)``, or cpp_pybinding, triton; older: compile_mps_shader.
_SOURCE = re.compile(r"^(\w+) = (?:async_compile\.\w+|compile_mps_shader)\(.*?'''(.*?)'''", re.MULTILINE | re.DOTALL)
_CALL = re.compile(
    r"^\s*(?:\w+ = )?(?:"
    r"(?P<made>(?:mps_lib_\d+\.)?generated_kernel\w*|cpp_fused\w*|triton_\w+(?=\.run\())(?:\.run)?"
    r"|extern_kernels\.(?P<extern>\w+)|torch\.ops\.(?:aten\.)?(?P<operator>[\w.]+))\(",
    re.MULTILINE,
)
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "bias_addmm"))


@dataclass(frozen=True, slots=True)
class Lowered:
    """What Inductor made of one piece under given outcomes.

    Attributes:
        label: the block that the piece stands for.
        outcome: of all its sites.
        code: the wrapper in Python, with the sources of the kernels in it.
        sources: the kernels that were generated, by name: Metal, C++ or Triton.
        fused: calls of these kernels.
        products: calls of a library's matrix product.
        attentions: calls of a library's attention.
        others: other kernels of a library's that are called, by name.
    """

    label: str
    outcome: Outcome
    code: str
    sources: dict[str, str]
    fused: int
    products: int
    attentions: int
    others: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """``(fused, products, attentions, others)``."""
        return self.fused, self.products, self.attentions, len(self.others)


def lower_pieces(
    gm: fx.GraphModule,
    cache: CacheConfig,
    device: str,
    *,
    outcomes: Sequence[Outcome] = OUTCOMES,
    labels: Collection[str] | None = None,
) -> Iterator[Lowered]:
    """The kernels of each different piece of a model, with all of its sites under each of ``outcomes``.

    Args:
        gm: a graph as ``capture_graphs`` gives it, captured on the CPU (tensors without data will do).
        cache: how values are stored.
        device: ``"mps"``, ``"cpu"`` or ``"cuda"``.
        labels: the pieces to lower, by the module path of their block; None for all.

    Raises:
        Whatever Inductor raises for a piece that it cannot lower for the device, for example of float64 on MPS.
    """
    for label, outcome, variant, arguments in variants(gm, cache, device, outcomes):
        if labels is None or label in labels:
            yield lower(variant, arguments, label, outcome)


def variants(
    gm: fx.GraphModule,
    cache: CacheConfig,
    device: str,
    outcomes: Sequence[Outcome] = OUTCOMES,
    measures: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Outcome, Variant, list[Any]]]:
    """Each different piece with all sites under one outcome: label, outcome, the piece, and what it is called with.

    The pieces are those that the runtime would compile, moved to ``device``; the arguments are fake tensors there. Left
    out are pieces that are given a size which is known only when another has run.
    """
    regions = [region for region in find_stored(gm, cache.target) if not region.site.reason]
    numbered = [replace(r, site=replace(r.site, index=i)) for i, r in enumerate(regions)]
    graph = CapturedGraph(gm, numbered, cache, Lowerer(_never), {}, measures, compares=True)
    target, mode = torch.device(device), FakeTensorMode(allow_non_fake_inputs=True)
    specs = [[spec.allocate() for spec in replaced] for replaced in _without_data(graph.specs(()))]
    for outcome in outcomes:
        seen: set[int] = set()
        each = [outcome if i in graph.comparable else _ALONE.get(outcome, outcome) for i in range(graph.num_sites)]
        for step in graph.build(tuple(each)).steps:
            if id(step.variant) in seen or step.symbolic:
                continue
            seen.add(id(step.variant))
            stored = iter([_stored(specs, t.site, t.exit, t.part) for t in step.transfers])
            arguments = [
                like(node.meta["example_value"] if "example_value" in node.meta else next(stored), target, mode)
                for node in step.variant.gm.graph.nodes
                if node.op == "placeholder"
            ]
            yield step.piece.label, outcome, replace(step.variant, gm=moved(step.variant.gm, target)), arguments


def lower(variant: Variant, arguments: Sequence[Any], label: str = "", outcome: Outcome = Outcome.COMPUTE) -> Lowered:
    """Inductor's code for ``variant``, called with fake tensors, as the runtime would have it compiled."""
    code = _code(variant, arguments)
    body = code[code.index("def call(") :]
    body = body[: body.index("\n\n\n")] if "\n\n\n" in body else body
    calls = list(_CALL.finditer(body))
    library = [found["extern"] or found["operator"] for found in calls if not found["made"]]
    products = sum(name in _PRODUCTS for name in library)
    attentions = [name for name in library if name.startswith("_scaled_dot_product")]
    others = tuple(n for n in library if n not in _PRODUCTS and n not in attentions)
    sources = {found[1]: found[2] for found in _SOURCE.finditer(code)}
    return Lowered(label, outcome, code, sources, len(calls) - len(library), products, len(attentions), others)


def _code(variant: Variant, arguments: Sequence[Any]) -> str:
    from torch._inductor.graph import GraphLowering

    devices = {a.device.type for a in arguments if isinstance(a, torch.Tensor)}
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(torch.no_grad())
        for device in sorted(devices):
            enter(pretending(device))
        # A graph from a cache is not lowered, so that there would be no code to see.
        enter(torch._functorch.config.patch(enable_autograd_cache=False))
        enter(torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False))
        enter(mock.patch.object(GraphLowering, "compile_to_module", _stop))
        try:
            Lowerer(resolve_backend("inductor")).lower(variant, arguments)
        except _Generated as generated:
            return generated.code
    raise AssertionError("Inductor compiled the piece without generating code")


class _Generated(BaseException):
    """Carries the code out of Inductor, past all that it does with it; no ``Exception``, which it would wrap."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code


def _stop(lowering: Any) -> Any:
    raise _Generated(lowering.codegen()[0].value)


def _stored(specs: Sequence[Sequence[Sequence[torch.Tensor]]], site: int, index: int, part: int) -> torch.Tensor:
    """What a stored tensor looks like."""
    if index == MEASUREMENTS:
        return torch.empty(ROW, device="meta")
    if index == DIFFERENCE:
        return torch.empty(DIFFERENCE_ROW, device="meta")
    return specs[site][index if index >= 0 else LENT - index][part]


def _without_data(specs: Sequence[Sequence[ExitSpec]]) -> list[list[ExitSpec]]:
    return [[replace(spec, device=torch.device("meta")) for spec in exits] for exits in specs]


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is compiled here")
