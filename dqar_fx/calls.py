"""An optimised call of a model, put together: what Dynamo compiles, who takes its graphs, what tells the step."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dqar_fx.backend import CaptureBackend
from dqar_fx.checks import check_parts
from dqar_fx.compiled import OptimizedCall, isolation, state_names
from dqar_fx.errors import DqarError
from dqar_fx.runtime.conditioning import InputReader
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.runtime.standin import StandIn
from dqar_fx.shortcut.call import Shortcuts


def forward_names(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's forward, in order."""
    return [name for name in inspect.signature(model.forward).parameters if name != "self"]


def call_arguments(inputs: object, kind: type[DqarError]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call, from either a tuple or a mapping.

    Raises:
        DqarError: it is neither; of the given ``kind``.
    """
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    raise kind(
        f"inputs is a {type(inputs).__name__}. Give the arguments of one call of the model: a dict by their names, or "
        f"a tuple in their order."
    )


def make_call(
    model: nn.Module,
    runtime: Runtime,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    tune: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None,
) -> OptimizedCall:
    """What calls ``model`` compiled, with ``runtime`` deciding; the model itself is left as it is.

    ``tune`` is called before the first capture, with the arguments of that call; once, if it returns True.
    """
    runtime.state_names = state_names(model)
    settings = {"dynamic": dynamic, "fullgraph": fullgraph, **isolation()}
    reference = weakref.ref(model)  # Dynamo keeps the backend for as long as it keeps the code
    capture = CaptureBackend(runtime, delimited=True, check=lambda: check_parts(reference()))
    original = plain_call(model)

    def compile_model() -> Callable[..., Any]:
        return torch.compile(original, backend=capture, **settings)

    names = forward_names(model)
    argument = timestep_argument(names)
    runtime.latents = next((name for name in names if argument is None or name != argument[0]), "")
    reader = InputReader(names, argument[0] if argument else "")
    runtime.shortcuts = Shortcuts(model, runtime.run)
    return OptimizedCall(runtime, compile_model, argument, reader, runtime.shortcuts, tune)


def plain_call(model: nn.Module) -> Callable[..., Any]:
    """What ``nn.Module.compile`` would compile, also of a model that is optimised already."""
    call: Any = model._call_impl
    plain: Callable[..., Any] = call.__wrapped__ if isinstance(call, StandIn) else call
    return plain
