"""``optimize``, ``restore`` and ``runtime``: the pass put on a module, taken off it, and asked about."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dqar_fx.backend import CaptureBackend, make_runtime, runtime_of_compiled
from dqar_fx.config import CacheConfig
from dqar_fx.errors import CaptureError, RuntimeStateError
from dqar_fx.graph.sites import Site
from dqar_fx.plan import Plan
from dqar_fx.runtime.conditioning import InputReader
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.runtime.standin import StandIn
from dqar_fx.schedule import Schedule

Module = TypeVar("Module", bound=nn.Module)

#: How often one model may be captured before Dynamo leaves it eager for good. Its own limit is 8, which a few LoRAs,
#: each switched on and off, fused and not, exceed; captures cost little where pieces are those compiled before.
RECOMPILE_LIMIT = 64

_COMPILED_ALREADY = (
    "this model is compiled by dqar_fx already, equal blocks only once. Leave the call out, or call "
    "dqar_fx.restore(model) first."
)
#: Methods that would replace or bypass what ``optimize`` did, and why they are refused while a model is optimised.
_REFUSED = {
    "compile": _COMPILED_ALREADY,
    "compile_repeated_blocks": _COMPILED_ALREADY,
    "enable_cache": "this model reuses attentions through dqar_fx already, and two caches would each read what the "
    "other one skipped. Use one of them: to take this one, call dqar_fx.restore(model) first.",
}
#: Methods of diffusers models that write weights through ``tensor.data``, which no version counter sees.
_WRITE_WEIGHTS = ("load_lora_adapter", "fuse_lora", "unfuse_lora")


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
        RuntimeStateError: already optimised or compiled (the model or a part of it), with one of diffusers' own caches
            enabled, or an argument of the wrong kind.
        PlanError: at the first call, if a ``Plan`` was made for another number of sites.
    """
    _check_model(model)
    runtime = make_runtime(
        schedule=schedule, cache=cache, scheduler=scheduler, sites=sites, backend=backend, mode=mode, options=options,
        dynamic=dynamic,
    )  # fmt: skip
    runtime.state_names = frozenset(
        name for named in (model.named_parameters, model.named_buffers) for name, _ in named(remove_duplicate=False)
    )
    # Dynamo keeps what it compiled per function, and gives up (silently eager) after eight entries: with several models
    # of one class, or one model optimised several times, each needs entries of its own. torch >= 2.13 can do that.
    settings: dict[str, Any] = {"dynamic": dynamic, "fullgraph": fullgraph}
    known = inspect.signature(torch.compile).parameters
    if "isolate_recompiles" in known:
        settings["isolate_recompiles"] = True
    if "recompile_limit" in known:
        settings["recompile_limit"] = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    reference = weakref.ref(model)  # Dynamo keeps the backend for as long as it keeps the code
    capture = CaptureBackend(runtime, delimited=True, check=lambda: _check_parts(reference()))
    original = model._call_impl

    def compile_model() -> Callable[..., Any]:
        return torch.compile(original, backend=capture, **settings)

    names = [p for p in inspect.signature(model.forward).parameters if p != "self"]
    argument = timestep_argument(names)
    if argument is None and scheduler is None:
        warnings.warn(
            f"{type(model).__name__}.forward({', '.join(names)}) has no argument that looks like a timestep, so no "
            f"step can be told from another and every attention computes, unless you say which step it is: "
            f"runtime.begin_step(i).",
            stacklevel=2,
        )
    reader = InputReader(names, argument[0] if argument else "")
    model._compiled_call_impl = OptimizedCall(runtime, compile_model, argument, reader)
    if callable(getattr(type(model), "cache_context", None)):
        BranchContext(model, runtime)
    if callable(getattr(type(model), "_reset_stateful_cache", None)):
        EndOfRun(model, runtime)
    OuterCompile(model, "_call_impl")
    for name, why in _REFUSED.items():
        if callable(getattr(type(model), name, None)):
            Refused(model, name, why)
    for name in _WRITE_WEIGHTS:
        if callable(getattr(type(model), name, None)):
            WritesWeights(model, name)
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
    BranchContext.remove(model, "cache_context")
    EndOfRun.remove(model, "_reset_stateful_cache")
    OuterCompile.remove(model, "_call_impl")
    for name in _REFUSED:
        Refused.remove(model, name)
    for name in _WRITE_WEIGHTS:
        WritesWeights.remove(model, name)
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


class OptimizedCall:
    """What an optimised module calls: tells the runtime where a call begins and ends, and runs the compiled model.

    It hangs where ``nn.Module.compile`` hangs its own, so torch itself leaves it out of copies and pickles.
    """

    def __init__(
        self,
        runtime: Runtime,
        compile_model: Callable[[], Callable[..., Any]],
        timestep: tuple[str, int] | None,
        inputs: InputReader,
    ) -> None:
        self.runtime = runtime
        self._compile = compile_model
        self._compiled = compile_model()
        #: Lets Dynamo take boolean masks, ``nonzero`` and ``item`` into the graph, where it would break without. Put
        #: away after the first call of a model that has none: entering it takes 10 us.
        self._dynamic_operators: Any = torch._dynamo.config.patch(
            capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
        )
        self._first = True
        self._inputs = inputs
        self._name, self._position = timestep or ("", -1)

    # In a function that is itself compiled, Dynamo must call this as it is: traced into, it would be the plain model.
    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]  # torch leaves it untyped
        reason="this model was compiled by dqar_fx.optimize; what calls it need not be"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the model."""
        timestep = kwargs.get(self._name)
        if timestep is None and 0 <= self._position < len(args):
            timestep = args[self._position]
        runtime = self.runtime
        runtime.begin_call(timestep, self._inputs(args, kwargs))
        try:
            if self._dynamic_operators is None:
                result = self._compiled(*args, **kwargs)
            else:
                result = self._call_with_dynamic_operators(args, kwargs)
            runtime.end_call()
        except BaseException:
            runtime.abort_call()
            raise
        return result

    def _call_with_dynamic_operators(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, self._first = self._first, False
        try:
            with self._dynamic_operators:
                result = self._compiled(*args, **kwargs)
        except (TorchDynamoException, GuardOnDataDependentSymNode):
            if not first:
                raise
            # Not all of torch can be traced with sizes that are known only at run time: break the graph there instead.
            self._dynamic_operators = None
            self._compiled = self._compile()
            self.runtime.forget_captures()
            return self._compiled(*args, **kwargs)
        if not self.runtime.needs_dynamic_operators:
            self._dynamic_operators = None
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


class EndOfRun(StandIn):
    """A diffusers model's ``_reset_stateful_cache``, which every pipeline calls when its run is over."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__(model, "_reset_stateful_cache")
        self._runtime = runtime

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Reset what diffusers keeps, then free what was stored."""
        result = self.__wrapped__(*args, **kwargs)
        self._runtime.end_generation()
        return result


class OuterCompile(StandIn):
    """A module's ``_call_impl``, as it is, and yet another object.

    Where a function that is being compiled calls a module, Dynamo goes to ``forward`` at once, past what hangs in
    ``_compiled_call_impl``: the model would be compiled once more, without reuse, and nobody would know. It only does
    so for modules whose ``_call_impl`` is that of their class.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ever."""
        return self.__wrapped__(*args, **kwargs)


class Refused(StandIn):
    """A method that cannot be used on a model for as long as it is optimised."""

    def __init__(self, model: nn.Module, name: str, why: str) -> None:
        super().__init__(model, name)
        self._why = why

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Say why."""
        raise RuntimeStateError(f"{self._name}(): {self._why}")


class WritesWeights(StandIn):
    """A method that writes weights unseen: afterwards they count as changed, so that nothing stored is read."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, then say so."""
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            torch.autograd.graph.increment_version([p for p in self._owner.parameters() if not p.is_inference()])


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
    _check_parts(model)
    active = _active_dropout(model)
    if active:
        raise CaptureError(
            f"model is in training mode with dropout ({active}): a stored attention would freeze it. "
            f"Call model.eval() first."
        )


def _check_parts(model: nn.Module | None) -> None:
    """Refuse what was done to parts of the model and would get in the way."""
    if model is None:
        return
    config = getattr(model, "_cache_config", None)
    if config is not None:
        raise RuntimeStateError(
            f"diffusers' own cache is enabled on this model ({type(config).__name__}), and two caches would each read "
            f"what the other one skipped. Call model.disable_cache() first."
        )
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        # Of diffusers' hooks, those that keep something from call to call are caches; offloading and casting are not.
        stateful = [n for n, hook in getattr(registry, "hooks", {}).items() if getattr(hook, "_is_stateful", False)]
        if stateful:
            raise RuntimeStateError(
                f"a cache of diffusers hangs on {path or 'the model'} (hook {stateful[0]!r}), and two caches would "
                f"each read what the other one skipped. Remove it first: diffusers.hooks.HookRegistry."
                f"check_if_exists_or_initialize(model).remove_hook({stateful[0]!r}, recurse=True)."
            )
        compiled = getattr(module, "_compiled_call_impl", None)
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
            raise RuntimeStateError(
                f"{path} was compiled with torch.compile. dqar_fx compiles the whole model, equal blocks only once: "
                f"put the module itself ({path}._orig_mod) in its place first."
            )
        if path and isinstance(compiled, OptimizedCall):
            raise RuntimeStateError(f"{path} is optimised already. Call dqar_fx.restore(model.{path}) first.")
        if path and compiled is not None:
            raise RuntimeStateError(
                f"{path} was compiled by itself (compile_repeated_blocks() or {path}.compile()). dqar_fx compiles the "
                f"whole model, equal blocks only once. Undo it first: "
                f"for module in model.modules(): module._compiled_call_impl = None"
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
