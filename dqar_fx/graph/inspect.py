"""Capture a model's graphs to look at them: Dynamo alone, on tensors without data, nothing compiled or measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.overrides import TorchFunctionMode

from dqar_fx.errors import CaptureError
from dqar_fx.graph.attentions import attends
from dqar_fx.runtime.report import GraphBreak


@dataclass(frozen=True, slots=True)
class Capture:
    """What Dynamo makes of one call of a model.

    Attributes:
        graphs: one for each graph that ran, in order; a graph that ran twice stands there twice.
        breaks: the places where Dynamo could not go on in one graph.
        attentions: how often the eager model calls an attention operator (``scaled_dot_product_attention`` and its
            like). Those that the graphs do not hold run outside of them, where nothing can be rewritten.
    """

    graphs: tuple[fx.GraphModule, ...]
    breaks: tuple[GraphBreak, ...]
    attentions: int


class _Collector:
    """A Dynamo backend that keeps the graphs, runs them as they are, and notes the order in which they ran."""

    def __init__(self) -> None:
        self.ran: list[fx.GraphModule] = []
        self.breaks: list[GraphBreak] = []

    def __call__(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            self.breaks.append(GraphBreak.of(reason))

        def run(*arguments: Any) -> Any:
            self.ran.append(gm)
            return gm.forward(*arguments)

        return run


class _CountAttentions(TorchFunctionMode):
    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += attends(func)
        return func(*args, **(kwargs or {}))


def capture_graphs(model: nn.Module, inputs: Mapping[str, Any]) -> Capture:
    """Call ``model(**inputs)`` once eagerly and once under Dynamo, and return the graphs that ran.

    The model may have been built under a ``FakeTensorMode``: then no weight is allocated and nothing is computed. It is
    left as it was, and Dynamo forgets what it learned here, so that a later ``torch.compile`` of the same class starts
    afresh (as will, at their next call, models that were compiled before).

    Raises:
        CaptureError: the model cannot run these inputs, or Dynamo cannot trace it; the message has torch's own.
    """
    name = type(model).__name__
    counter = _CountAttentions()
    collector = _Collector()
    mode = detect_fake_mode(next(model.parameters(), None)) or nullcontext()
    try:
        with torch.no_grad(), mode, counter, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model is only looked at; it will warn again when it is used
            model(**inputs)
    except Exception as error:
        raise CaptureError(f"{name} cannot run the inputs {describe(inputs)}: {first_line(error)}") from error
    try:
        # As `optimize` does: sizes that depend on values stay in the graph, unless Dynamo cannot trace the model so.
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
            _run_compiled(model, inputs, collector, mode)
    except Exception:
        collector = _Collector()
        try:
            _run_compiled(model, inputs, collector, mode)
        except Exception as error:
            raise CaptureError(f"Dynamo cannot capture {name}: {first_line(error)}") from error
    return Capture(tuple(collector.ran), tuple(dict.fromkeys(collector.breaks)), counter.count)


def _run_compiled(
    model: nn.Module, inputs: Mapping[str, Any], collector: _Collector, mode: AbstractContextManager[Any]
) -> None:
    torch._dynamo.reset()
    try:
        with torch.no_grad(), mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What `optimize` compiles too; calling the module itself would run a compilation that is already in place.
            torch.compile(model._call_impl, backend=collector, dynamic=False)(**inputs)
    finally:
        torch._dynamo.reset()


def describe(inputs: Mapping[str, Any]) -> str:
    """``hidden_states [1, 4, 32, 32], timestep [1]``."""
    return ", ".join(f"{k} {_shape(v)}" for k, v in inputs.items())


def _shape(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_shape(v) for v in value)})"
    return repr(value)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
