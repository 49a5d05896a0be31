"""``optimize``, ``restore`` and ``runtime``: the pass put on a module, taken off it, and asked about."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from dqar_fx.backend import CaptureBackend, make_runtime, runtime_of_compiled
from dqar_fx.config import CacheConfig
from dqar_fx.errors import CaptureError, RuntimeStateError
from dqar_fx.graph.sites import Site
from dqar_fx.plan import Plan
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.runtime.standin import StandIn
from dqar_fx.schedule import Schedule

Module = TypeVar("Module", bound=nn.Module)


def optimize(
    model: Module,
    schedule: Schedule | Plan,
    *,
    cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen, so one default serves all calls
    scheduler: Any = None,
    sites: Callable[[Site], bool] | str | Sequence[str] | None = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Module:
    """Make a diffusion transformer reuse its attentions across denoising steps, inside compiled graphs.

    Nothing runs yet: the model is captured at its first call and each piece is compiled when it is first needed.

    Args:
        model: a diffusers transformer or any ``nn.Module`` whose attentions call ``scaled_dot_product_attention``.
        schedule: which attention reuses at which step: a ``Schedule`` or a ``Plan``.
        cache: how stored values look (INT8 per token by default).
        scheduler: the pipeline's diffusers scheduler. With it a step is identified without reading the device, and
            rules plan themselves for its number of steps. Without it the timestep's value is read once per call.
        sites: which attentions to rewrite: a predicate on ``Site``, or ``fnmatch`` patterns on module paths.
        backend: what the rewritten pieces are compiled with; ``"eager"`` runs them as FX graphs, bit-identical to the
            eager model where nothing is reused. ``mode``, ``options``, ``dynamic`` and ``fullgraph`` mean what they
            mean to ``torch.compile``.

    Returns:
        The same module, compiled in place; ``restore`` undoes it.

    Raises:
        CaptureError: not an ``nn.Module``, or in training mode with dropout. At the first call: no attention is found,
            or gradients are on.
        RuntimeStateError: already optimised or compiled, or an argument of the wrong kind.
        PlanError: at the first call, if a ``Plan`` was made for another number of sites.
    """
    _check_model(model)
    runtime = make_runtime(
        schedule=schedule, cache=cache, scheduler=scheduler, sites=sites, backend=backend, mode=mode, options=options,
        dynamic=dynamic,
    )  # fmt: skip
    # Dynamo keeps what it compiled per function, and gives up (silently eager) after eight entries: with several models
    # of one class, or one model optimised several times, each needs entries of its own. torch >= 2.13 can do that.
    settings: dict[str, Any] = {"dynamic": dynamic, "fullgraph": fullgraph}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    compiled = torch.compile(model._call_impl, backend=CaptureBackend(runtime, delimited=True), **settings)
    names = [p for p in inspect.signature(model.forward).parameters if p != "self"]
    argument = timestep_argument(names)
    if argument is None and scheduler is None:
        warnings.warn(
            f"{type(model).__name__}.forward({', '.join(names)}) has no argument that looks like a timestep, so no "
            f"step can be told from another and every attention computes, unless you say which step it is: "
            f"runtime.begin_step(i).",
            stacklevel=2,
        )
    model._compiled_call_impl = OptimizedCall(runtime, compiled, argument)
    if callable(getattr(type(model), "cache_context", None)):
        BranchContext(model, runtime)
    return model


def restore(model: Module) -> Module:
    """Undo ``optimize``: the module (and the scheduler) is exactly as it was before, and what was stored is freed.

    Compiled code stays in Dynamo's own cache, as that of ``torch.compile`` does, until ``torch._dynamo.reset()``.

    Raises:
        RuntimeStateError: the model is not optimised.
    """
    runtime(model).release()
    model._compiled_call_impl = None
    BranchContext.remove(model, "cache_context")
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
    found = runtime_of_compiled(model)
    if found is None:
        raise RuntimeStateError(
            f"this {type(model).__name__} is not optimised. Call dqar_fx.optimize(model, schedule) first (a model "
            f'compiled with backend="dqar_fx" has a runtime after its first call).'
        )
    return found


class OptimizedCall:
    """What an optimised module calls: tells the runtime where a call begins and ends, and runs the compiled model.

    It hangs where ``nn.Module.compile`` hangs its own, so torch itself leaves it out of copies and pickles.
    """

    def __init__(self, runtime: Runtime, compiled: Callable[..., Any], timestep: tuple[str, int] | None) -> None:
        self.runtime = runtime
        self._compiled = compiled
        self._name, self._position = timestep or ("", -1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the model."""
        timestep = kwargs.get(self._name)
        if timestep is None and 0 <= self._position < len(args):
            timestep = args[self._position]
        runtime = self.runtime
        runtime.begin_call(timestep)
        try:
            result = self._compiled(*args, **kwargs)
            runtime.end_call()
        except BaseException:
            runtime.abort_call()
            raise
        return result


class BranchContext(StandIn):
    """A diffusers model's ``cache_context`` that also tells the runtime which branch its pipeline names."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__(model, "cache_context")
        self._runtime = runtime

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        """The calls inside belong to branch ``name``."""
        with self.__wrapped__(name, **kwargs), self._runtime.branch(name):
            yield


def _check_model(model: Any) -> None:
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise RuntimeStateError(
            "model was compiled with torch.compile already. Pass the module itself: model._orig_mod."
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model is a {type(model).__name__}, not an nn.Module. Pass the denoiser itself, e.g. pipe.transformer."
        )
    compiled = getattr(model, "_compiled_call_impl", None)
    if isinstance(compiled, OptimizedCall):
        raise RuntimeStateError("model is optimised already. Call dqar_fx.restore(model) first, then optimize it anew.")
    if compiled is not None:
        raise RuntimeStateError(
            "model was compiled in place with model.compile(). dqar_fx compiles it itself: set "
            "model._compiled_call_impl = None (or take a fresh model), then optimize it."
        )
    active = _active_dropout(model)
    if active:
        raise CaptureError(
            f"model is in training mode with dropout ({active}): a stored attention would freeze it. "
            f"Call model.eval() first."
        )


def _active_dropout(model: nn.Module) -> str:
    """The first module that would drop something in its present mode, as ``path=probability``; "" if there is none."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        for name in ("p", "dropout", "dropout_p", "dropout_prob", "attn_drop", "attention_dropout"):
            if name == "p" and not isinstance(module, nn.modules.dropout._DropoutNd):
                continue
            value = vars(module).get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return f"{path or type(module).__name__}.{name}={value}"
    return ""
