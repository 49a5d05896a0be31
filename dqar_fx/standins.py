"""Methods of an optimised module (a diffusers model, mostly) that have to know of it, or would get in its way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from dqar_fx.errors import RuntimeStateError
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.runtime.standin import StandIn

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


def install(model: nn.Module, runtime: Runtime) -> None:
    """Put the stand-ins on ``model``: those whose method its class has."""
    kind = type(model)
    OuterCompile(model, "_call_impl")
    if callable(getattr(kind, "cache_context", None)):
        BranchContext(model, runtime)
    if callable(getattr(kind, "_reset_stateful_cache", None)):
        EndOfRun(model, runtime)
    for name, why in _REFUSED.items():
        if callable(getattr(kind, name, None)):
            Refused(model, name, why)
    for name in _WRITE_WEIGHTS:
        if callable(getattr(kind, name, None)):
            WritesWeights(model, name)


def remove(model: nn.Module) -> None:
    """Take all of them off again."""
    OuterCompile.remove(model, "_call_impl")
    BranchContext.remove(model, "cache_context")
    EndOfRun.remove(model, "_reset_stateful_cache")
    for name in _REFUSED:
        Refused.remove(model, name)
    for name in _WRITE_WEIGHTS:
        WritesWeights.remove(model, name)


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
