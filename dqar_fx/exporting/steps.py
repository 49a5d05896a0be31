"""Each different step of a plan as a model of its own in one AOTInductor package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dqar_fx.errors import ExportError
from dqar_fx.exporting.source import Source
from dqar_fx.graph.inspect import first_line
from dqar_fx.graph.specialise import BufferUse, Outcome, Variant, specialise
from dqar_fx.runtime.generation import StepTable


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored tensor: of which site, which exit, which part (0: values, 1: scales, 2: balancing factors)."""

    use: BufferUse
    value: Tensor
    is_given: bool  # it has a value before the first store


def stored_tensors(source: Source, used: Sequence[int]) -> list[Stored]:
    """What the sites ``used`` store, in the order of sites, exits and parts, allocated."""
    found = []
    for site in used:
        for index, (spec, layout) in enumerate(zip(source.specs[site], source.layouts[site], strict=True)):
            for part, value in enumerate(spec.allocate()):
                given = part >= layout.written
                found.append(Stored(BufferUse(site, index, part), value if given else value.zero_(), given))
    return found


class Step(nn.Module):
    """One kind of step: ``(inputs, weights, stored) -> outputs``, each a list; what is stored is written in place."""

    def __init__(self, source: Source, stored: Sequence[Stored], outcomes: Sequence[Outcome]) -> None:
        super().__init__()
        piece = source.piece
        reused = frozenset(i for i, site in enumerate(piece.checked) if outcomes[site] is Outcome.REUSE)
        mine = [outcomes[site] for site in piece.sites]
        layouts = [source.layouts[site] for site in piece.sites]
        returned = list(dict.fromkeys(output.position for output in source.outputs))
        variant = specialise(piece.gm, mine, layouts, returned, reused)
        self._gm = without_metadata(variant.gm)
        self._places = _places(source, stored, variant)
        self._returned = [variant.outputs.index(output.position) for output in source.outputs]

    def forward(self, inputs: list[Tensor], weights: list[Tensor], stored: list[Tensor]) -> list[Tensor]:
        """The tensors of the model's result, in order."""
        given = {"input": inputs, "weight": weights, "stored": stored}
        results = self._gm(*(given[kind][i] for kind, i in self._places))
        return [results[i] for i in self._returned]


def without_metadata(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm``, without the fake tensors of the capture, which would clash with those of another tracing."""
    for node in gm.graph.nodes:
        node.meta.clear()
    return gm


def _places(source: Source, stored: Sequence[Stored], variant: Variant) -> list[tuple[str, int]]:
    """Where the arguments of ``variant`` are, in calling order."""
    inputs, weights = list(source.inputs), list(source.weights)
    known = {each.use: i for i, each in enumerate(stored)}
    places = []
    for i in variant.inputs:
        name = source.piece.inputs[i]
        places.append(("input", inputs.index(name)) if name in source.inputs else ("weight", weights.index(name)))
    sites = source.piece.sites
    uses = (BufferUse(sites[use.guard], use.exit, use.part) for use in variant.buffers)
    return [*places, *(("stored", known[use]) for use in uses)]


def steps_of(source: Source) -> list[tuple[Outcome, ...]]:
    """The outcomes of every step of a generation."""
    return StepTable(source.plan, 0, source.plan.num_sites).outcomes


def compile_steps(source: Source, stored: Sequence[Stored], path: Path, options: Mapping[str, Any]) -> list[str]:
    """Write an AOTInductor package with one model for each different step; the name of the model of every step.

    Raises:
        ExportError: a step cannot be exported or compiled; the message has torch's own.
    """
    from torch._inductor.package.package import package_aoti

    steps = steps_of(source)
    names = {outcomes: f"step_{i}" for i, outcomes in enumerate(dict.fromkeys(steps))}
    arguments = (
        [value for _, value in source.inputs.values()],
        [value for _, value in source.weights.values()],
        [each.value for each in stored],
    )
    files: dict[str, list[str]] = {}
    for outcomes, name in names.items():
        program = export_module(Step(source, stored, outcomes), arguments, source.model)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its own names
                files[name] = torch._inductor.aot_compile(
                    program.module(), arguments, options={**options, "aot_inductor.package": True}
                )  # type: ignore[assignment]  # with that option, a list of files
        except Exception as error:
            raise ExportError(
                f"AOTInductor cannot compile a step of {source.model}: {first_line(error)}. It needs a C++ compiler "
                f"(g++ or clang); form='cond' needs none."
            ) from error
    package_aoti(str(path), files)  # type: ignore[arg-type]  # typed for a narrower list
    return [names[outcomes] for outcomes in steps]


def export_module(module: nn.Module, arguments: tuple[Any, ...], model: str) -> torch.export.ExportedProgram:
    """``module`` as torch exports it, with static sizes.

    Raises:
        ExportError: torch cannot; the message has its own.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, arguments, strict=False)
    except Exception as error:
        raise ExportError(f"torch.export cannot take {model}: {first_line(error)}") from error
