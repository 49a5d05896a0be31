"""``export``: a model's steps under a plan as a package that runs without this library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dqar_fx.calls import call_arguments
from dqar_fx.checks import check_model
from dqar_fx.config import CacheConfig
from dqar_fx.errors import ExportError
from dqar_fx.exporting.conditional import Conditional
from dqar_fx.exporting.source import Source, capture
from dqar_fx.exporting.steps import Stored, compile_steps, export_module, stored_tensors
from dqar_fx.plan import COMPUTE, REUSE, Plan
from dqar_fx.schedule import Schedule

FORMAT, VERSION = "dqar_fx.export", 1
FORMS = ("steps", "cond")
PARTS = ("values", "scales", "factors")


def export(
    model: nn.Module,
    plan: Plan | Schedule,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    form: str = "steps",
    cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` under ``plan`` as a package that torch alone can load and run.

    ``form="steps"``: an AOTInductor package (``.pt2``) with one compiled model for each different set of outcomes that
    the plan's steps have (for an interval three or four). Each takes three lists of tensors,
    ``(inputs, weights, stored)``, returns the tensors of the model's result, and writes what it stores into ``stored``.
    The weights are no part of the compiled code: one ``.safetensors`` beside the package serves all of its models.

    ``form="cond"``: one ``torch.export`` program (``.pt2``), whose guards are ``torch.cond``. It takes
    ``(inputs, stored, reuse)`` with ``reuse`` bool ``[sites]``, a row of the plan (or of any other whose row 0 is
    False), and returns ``(outputs, stored)``: of the next step. The weights are in it. No compiler is needed.

    Calibrated balancing factors, which are stored before the first step, stand in the ``.safetensors`` too (``given``).

    Beside either stands a ``.json``: the plan, which model each step runs, and names, shapes and dtypes of inputs,
    weights, stored tensors and outputs, in the order of the lists. ``examples/run_exported.py`` is all that it
    takes to run a package. Sizes, dtypes and devices are fixed to those of ``inputs``, and so are arguments that are no
    tensors; a package checks nothing, so the loop that runs it must. What depends on the prompt alone
    (``Site.lossless``) is read at every step after the first: a generation has one prompt.

    Args:
        model: not optimised, in eval mode; one graph.
        plan: which attention reuses at which step.
        inputs: the arguments of one call, by name or in order.
        path: of the package; ends in ``.pt2``.
        form: ``"steps"`` or ``"cond"``.
        cache: how values are stored (beside the model).
        options: of Inductor, for ``form="steps"``.

    Returns:
        The path of the package.

    Raises:
        ExportError: the inputs do not fit the model, it is not one graph, or it cannot be exported or compiled.
        PlanError: the plan is for another number of sites.
        CaptureError, RuntimeStateError: as ``optimize``.
    """
    check_model(model)
    args, kwargs = call_arguments(inputs, ExportError)
    target = Path(path)
    if form not in FORMS:
        raise ExportError(f"form is {form!r}. Use {' or '.join(map(repr, FORMS))}.")
    if target.suffix != ".pt2":
        raise ExportError(f"path is {str(target)!r}. torch loads packages whose name ends in .pt2.")
    if cache.device is not None:
        raise ExportError(
            f"cache.device is {cache.device!r}: in a package, what is stored is a list of tensors beside the model, "
            f"for the loop to keep. Leave it out."
        )
    if form == "cond" and options:
        raise ExportError("options are Inductor's, and form='cond' compiles nothing. Leave them out.")
    source = capture(model, plan, args, kwargs, cache)
    stored = stored_tensors(source, [site for site in range(len(source.sites)) if source.plan.reuse[:, site].any()])
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {_name(each): each.value.clone() for each in stored if each.is_given}
    if form == "steps":
        steps = compile_steps(source, stored, target, options or {})
        tensors |= {name: value.clone() for name, value in source.weights.values()}  # tied ones apart
    else:
        _refuse_folded(source)
        values = [value for _, value in source.inputs.values()]
        row = torch.zeros(len(source.sites), dtype=torch.bool, device=values[0].device)
        module = Conditional(source, stored)
        program = export_module(module, (values, [each.value for each in stored], row), source.model)
        torch.export.save(program, target)
        steps = []
    if tensors:
        save_file(tensors, target.with_suffix(".safetensors"))
    document = _document(source, stored, form, steps, str(cache))
    target.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return target


def _refuse_folded(source: Source) -> None:
    for site, layouts in zip(source.sites, source.layouts, strict=True):
        if any(layout.balance and layout.of_keys for layout in layouts):
            raise ExportError(
                f"{site.path}: balanced keys are undone in the queries, outside of what torch.cond decides on. Export "
                f"form='steps', or leave the balance out."
            )


def _document(source: Source, stored: list[Stored], form: str, steps: list[str], cache: str) -> dict[str, Any]:
    """All that a loop has to know."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "form": form,
        "model": source.model,
        "torch": torch.__version__,
        "schedule": source.plan.schedule,
        "cache": cache,
        "reuse": ["".join(REUSE if reused else COMPUTE for reused in row) for row in source.plan.reuse],
        "steps": steps,
        "sites": [site.path for site in source.sites],
        "inputs": [{"path": list(way), **_looks(value)} for way, value in source.inputs.values()],
        "weights": [name for name, _ in source.weights.values()] if form == "steps" else [],
        "stored": [{"name": _name(e), "given": e.is_given, **_looks(e.value)} for e in stored],
        "outputs": [{"path": output.path, **_looks(output.value)} for output in source.outputs],
    }


def _name(each: Stored) -> str:
    return f"site {each.use.guard}, exit {each.use.exit}, {PARTS[each.use.part]}"


def _looks(value: torch.Tensor) -> dict[str, Any]:
    return {
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": value.device.type,
    }
