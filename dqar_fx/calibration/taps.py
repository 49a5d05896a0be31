"""The captured model, run eagerly with a tap at each attention: what calibration looks through."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dqar_fx.checks import check_parts
from dqar_fx.compiled import isolation
from dqar_fx.graph.capture import fork
from dqar_fx.graph.guard import guard_nodes
from dqar_fx.graph.specialise import ExitLayout
from dqar_fx.runtime.program import CapturedGraph
from dqar_fx.runtime.runtime import Runtime


class Visitor(Protocol):
    """Who looks at the attentions of a call."""

    def visit(self, site: int, exits: tuple[Tensor, ...], layouts: Sequence[ExitLayout]) -> tuple[Tensor, ...]:
        """Called as each site of a call has computed; what it returns takes the place of ``exits``."""


class TappedModel:
    """A model whose attentions can be looked at, whatever it is made of: the graphs that the runtime would rewrite.

    Args:
        model: the module; it is not changed.
        runtime: takes the graphs in, and so decides which attentions are sites, and in which order.
    """

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self._model = model
        self._runtime = runtime
        self._visitor: Visitor | None = None
        self._sites = 0
        #: The graphs of the first call, in the order in which they ran.
        self.graphs: tuple[CapturedGraph, ...] = ()
        self._ran: list[CapturedGraph] = []
        self._dynamic = True
        self._compiled = self._compile()

    @property
    def num_sites(self) -> int:
        """Attention sites of a call; 0 before the first."""
        return sum(graph.num_sites for graph in self.graphs)

    def __call__(self, visitor: Visitor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One call of the model, every site of which is shown to ``visitor``."""
        self._visitor, self._sites, self._ran = visitor, 0, []
        with warnings.catch_warnings():
            # Dynamo looks at the gradient of every input, and those that are no leaves have none.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            # As ``optimize`` does: sizes that depend on values stay in the graph, unless Dynamo cannot trace it so.
            result = self._run(args, kwargs) if self._dynamic else self._compiled(*args, **kwargs)
        self._visitor = None
        if not self.graphs:
            self.graphs = tuple(self._ran)
        return result

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
                return self._compiled(*args, **kwargs)
        except (TorchDynamoException, GuardOnDataDependentSymNode, AssertionError):  # the last one Dynamo's own as well
            if self.graphs:
                raise
            self._dynamic = False
            self._runtime.forget_captures()
            self._sites, self._ran, self._compiled = 0, [], self._compile()
            return self._compiled(*args, **kwargs)

    def _compile(self) -> Callable[..., Any]:
        return torch.compile(self._model._call_impl, backend=self._capture, dynamic=False, **isolation())

    def _capture(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        check_parts(self._model)
        graph = self._runtime.capture(gm)
        tapped = fork(graph.guarded)
        for guard in guard_nodes(tapped.graph):
            guard.target = _tap(self, graph)
        tapped.recompile()

        def run(*arguments: Any) -> Any:
            self._ran.append(graph)
            first, self._sites = self._sites, self._sites + graph.num_sites
            self._first = first
            return tapped.forward(*arguments)

        return run

    def visit(self, graph: CapturedGraph, site: int, exits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Show one site of the call that runs to its visitor."""
        assert self._visitor is not None  # a call of ours is running
        if graph.regions[site].site.lossless:
            return exits
        return self._visitor.visit(self._first + site, exits, graph.layouts[site])


def _tap(model: TappedModel, graph: CapturedGraph) -> Callable[..., tuple[Tensor, ...]]:
    def tap(site: int, *exits: Tensor) -> tuple[Tensor, ...]:
        return model.visit(graph, site, exits)

    return tap


def as_stored(value: Tensor, layout: ExitLayout) -> Tensor:
    """``value`` as it would be read back from the cache: quantised and dequantised, in its own dtype."""
    return layout.unpack(*layout.pack(value)) if layout.granularity else value
