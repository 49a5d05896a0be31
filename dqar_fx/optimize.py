"""``optimize``, ``restore`` and ``runtime``: the pass put on a module, taken off it, and asked about."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from dqar_fx import standins
from dqar_fx.backend import make_runtime, runtime_of_compiled
from dqar_fx.calibration import binding
from dqar_fx.calls import forward_names, make_call
from dqar_fx.checks import check_model
from dqar_fx.compiled import OptimizedCall
from dqar_fx.config import CacheConfig
from dqar_fx.errors import RuntimeStateError
from dqar_fx.gates import Gates
from dqar_fx.graph.sites import Site
from dqar_fx.plan import Plan
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.schedule import Schedule
from dqar_fx.tune import FirstCall, is_auto
from dqar_fx.tuning.choice import SiteChoice
from dqar_fx.tuning.measure import Settings

Module = TypeVar("Module", bound=nn.Module)


def optimize(
    model: Module,
    schedule: Schedule | Plan,
    *,
    cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen, so one default serves all calls
    gates: Gates | None = None,
    scheduler: Any = None,
    sites: SiteChoice | Callable[[Site], bool] | str | Sequence[str] | None = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    cuda_graphs: bool | str = False,
) -> Module:
    """Make a diffusion transformer reuse its attentions across denoising steps, inside compiled graphs.

    Nothing runs yet: the model is captured at its first call and each piece is compiled when it is first needed.

    Args:
        model: a diffusers transformer or any ``nn.Module`` with attentions: ``scaled_dot_product_attention``,
            ``flex_attention``, ``nn.MultiheadAttention``, or written out in a module that is called an attention.
        schedule: which attention reuses at which step: a ``Schedule`` or a ``Plan``.
        cache: how stored values look (INT8 per token by default).
        gates: what may block a reuse that the schedule allows, by what was measured (DQAR's cascade); None for none.
        scheduler: the pipeline's diffusers scheduler. With it a step is identified without reading the device, and
            rules plan themselves for its number of steps. Without it the timestep's value is read once per call.
        sites: which attentions to rewrite: a predicate on ``Site``, or ``fnmatch`` patterns on module paths. None: all
            that can be, on MPS less those that cannot pay by estimate (the report names them; ``"*"`` takes them too).
            Or which may reuse, all being numbered: ``tune(...).sites``, or ``"auto"``: at the first call, before
            anything is stored, measure with its arguments (see ``tune``) and keep those whose reuse pays on this
            device.
        backend: what the rewritten pieces are compiled with; ``"eager"`` runs them as FX graphs, bit-identical to the
            eager model where nothing is reused. ``mode``, ``options``, ``dynamic`` and ``fullgraph`` mean what they
            mean to ``torch.compile``.
        cuda_graphs: record steps that repeat, on a CUDA device, and launch each at once (see
            ``dqar_fx.runtime.cuda_graphs``). ``"auto"``: where that is possible; the report says where not. True:
            refuse where there is no CUDA device, and warn where a graph cannot be recorded. False, as long as nobody
            has run them on a GPU: never. Recordings keep the memory of a step, and that of the stored values, between
            generations; ``runtime.reset`` frees it.

    Returns:
        The same module, compiled in place; ``restore`` undoes it.

    Raises:
        CaptureError: not an ``nn.Module``, or in training mode with dropout. At the first call: no attention is found,
            or gradients are on.
        RuntimeStateError: already optimised or compiled (the model or a part of it), with one of diffusers' own caches
            enabled, or an argument of the wrong kind. ``cuda_graphs=True`` without a CUDA device, or beside a mode that
            makes CUDA graphs of its own.
        GateError: a gate that nothing in this run can answer.
        PlanError: at the first call, if a ``Plan`` was made for another number of sites.
        TuningError: at the first call, if ``tune(...).sites`` were.
    """
    check_model(model)
    if isinstance(schedule, Plan):
        binding.check(schedule, model, scheduler, cache)
    auto = is_auto(sites)
    runtime = make_runtime(
        schedule=schedule, cache=cache, gates=gates, scheduler=scheduler, sites=None if auto else sites,
        backend=backend, mode=mode, options=options, dynamic=dynamic, cuda_graphs=cuda_graphs,
    )  # fmt: skip
    settings = Settings(cache=cache, backend=backend, mode=mode, options=options, dynamic=dynamic, fullgraph=fullgraph)
    tune = FirstCall(model, runtime, settings) if auto else None
    call = make_call(model, runtime, dynamic=dynamic, fullgraph=fullgraph, tune=tune)
    names = forward_names(model)
    if timestep_argument(names) is None and scheduler is None:
        warnings.warn(
            f"{type(model).__name__}.forward({', '.join(names)}) has no argument that looks like a timestep, so no "
            f"step can be told from another and every attention computes, unless you say which step it is: "
            f"runtime.begin_step(i).",
            stacklevel=2,
        )
    model._compiled_call_impl = call
    standins.install(model, runtime)
    return model


def restore(model: Module) -> Module:
    """Undo ``optimize``: the module (and the scheduler) is exactly as it was before, and what was stored is freed.

    Compiled code stays in Dynamo's own cache, as that of ``torch.compile`` does, until ``torch._dynamo.reset()``.

    Raises:
        RuntimeStateError: the model is not optimised.
    """
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise RuntimeStateError(
            "this is what torch.compile made of a model. If that model was optimised, restore it: model._orig_mod."
        )
    runtime(model).release()
    model._compiled_call_impl = None
    standins.remove(model)
    return model


def runtime(model: Any) -> Runtime:
    """The runtime of an optimised model: steps, generations, branches, counts, report.

    Also of ``torch.compile(module, backend="dqar_fx", ...)``, after its first call.

    Raises:
        RuntimeStateError: the model was never optimised (or was restored).
    """
    call = getattr(model, "_compiled_call_impl", None)
    if isinstance(call, OptimizedCall):
        return call.runtime
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        call = model._orig_mod._compiled_call_impl
        if isinstance(call, OptimizedCall):  # optimised, then given to torch.compile
            return call.runtime
    found = runtime_of_compiled(model)
    if found is None:
        raise RuntimeStateError(
            f"this {type(model).__name__} is not optimised. Call dqar_fx.optimize(model, schedule) first (a model "
            f'compiled with backend="dqar_fx" has a runtime after its first call).'
        )
    return found
