"""What an optimised module calls."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dqar_fx.runtime.conditioning import InputReader
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.shortcut.call import MISS, Compiled, Shortcuts

#: How often one model may be captured before Dynamo leaves it eager for good. Its own limit is 8, which a few LoRAs,
#: each switched on and off, fused and not, exceed; captures cost little where pieces are those compiled before.
RECOMPILE_LIMIT = 64


def isolation() -> dict[str, Any]:
    """Arguments of ``torch.compile`` under which a model shares nothing with others of its class.

    Dynamo keeps what it compiled per function, and gives up (silently eager) after eight entries: with several models
    of one class, or one model optimised several times, each needs entries of its own. torch >= 2.13 can do that.
    """
    known = inspect.signature(torch.compile).parameters
    settings: dict[str, Any] = {}
    if "isolate_recompiles" in known:
        settings["isolate_recompiles"] = True
    if "recompile_limit" in known:
        settings["recompile_limit"] = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    return settings


def state_names(model: nn.Module) -> frozenset[str]:
    """Names of the model's parameters and buffers, all of those that one has."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return frozenset(name for each in named for name, _ in each)


class Resumed(Protocol):
    """A loaded capture, in front of the compiled model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""

    def compiled(self) -> Iterable[Compiled]:
        """What it calls in place of the forward, if it can."""


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
        shortcuts: Shortcuts,
        tune: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None,
    ) -> None:
        self.runtime = runtime
        #: Past Dynamo's guards on the model, where they have passed and it has not changed since.
        self.shortcuts = shortcuts
        self._compile = compile_model
        self._compiled: Callable[..., Any] = compile_model()
        #: Lets Dynamo take boolean masks, ``nonzero`` and ``item`` into the graph, where it would break without. Put
        #: away after the first call of a model that has none: entering it takes 10 us.
        self._dynamic_operators: Any = torch._dynamo.config.patch(
            capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
        )
        self._first = True
        self._tune = tune
        self._tuning = threading.Lock()
        self._inputs = inputs
        self._name, self._position = timestep or ("", -1)

    def resume(self, wrap: Callable[[Callable[..., Any]], Resumed]) -> None:
        """Call what ``wrap`` makes of the compiled model in its place."""
        resumed = wrap(self._compiled)
        self._compiled, self.shortcuts.loaded = resumed, resumed.compiled

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
            result = self.shortcuts(args, kwargs)
            if result is MISS:
                result = self._call_through_dynamo(args, kwargs)
            runtime.end_call()
        except BaseException:
            runtime.abort_call()
            raise
        return result

    def _call_through_dynamo(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._dynamic_operators is None:
            result = self._compiled(*args, **kwargs)
        else:
            result = self._call_with_dynamic_operators(args, kwargs)
        graph = self.runtime.only_graph
        if graph is not None:
            self.shortcuts.learn(args, kwargs, graph)
        return result

    def _choose_sites(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._tuning:  # threads that come meanwhile wait: the choice is made once
            if self._tune is not None and self._tune(args, kwargs):
                self._tune = None

    def _call_with_dynamic_operators(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._tune is not None:
            self._choose_sites(args, kwargs)
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
        if not self.runtime.needs_dynamic_operators and self._tune is None:
            self._dynamic_operators = None
        return result
