"""The pass as a Dynamo backend: ``torch.compile(model, backend="dqar_fx", options={"schedule": schedule})``."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dqar_fx.config import CacheConfig
from dqar_fx.errors import CaptureError, DqarError, GateError, RuntimeStateError
from dqar_fx.gates import Gates
from dqar_fx.graph.attentions import dropout_probability, is_attention
from dqar_fx.graph.effects import target_name
from dqar_fx.graph.lower import resolve_backend
from dqar_fx.plan import Plan
from dqar_fx.runtime.conditioning import SourceReader
from dqar_fx.runtime.cuda_graphs import step_graphs
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.program import CapturedGraph
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.schedule import Schedule

_OPTIONS = ("schedule", "cache", "gates", "scheduler", "sites", "backend", "mode", "options", "cuda_graphs")

#: Runtimes that the registered backend made, by the identity of the options they were made from. Weak: a runtime lives
#: as long as Dynamo keeps a graph of it, and holds its options, so that their identity stays its own.
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()


class CaptureBackend:
    """What Dynamo calls with each graph that it captured. One for each optimised model.

    Args:
        runtime: takes the graphs in and runs them.
        delimited: True if somebody else tells the runtime where a call of the model begins and ends (``optimize``
            does); False to read it off the graphs' own inputs.
        check: called before each capture; raises if the model has become one that cannot be captured.
    """

    def __init__(self, runtime: Runtime, delimited: bool, check: Callable[[], None] | None = None) -> None:
        self.runtime = runtime
        self._delimited = delimited
        self._check = check
        self.__name__ = "dqar_fx"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Take a captured graph in; what Dynamo calls in its place from now on."""
        started = time.perf_counter()
        try:
            if self._check is not None:
                self._check()
            _refuse_training(gm, example_inputs)
            graph = self.runtime.capture(gm)
        except DqarError as error:
            # Raised here, Dynamo would wrap it in an error of its own; raised by the graph, it reaches the caller as it
            # is.
            return _raising(error)
        finally:
            self.runtime.capture_seconds += time.perf_counter() - started
        return self._delimited_call(graph) if self._delimited else self._own_call(graph)

    def _delimited_call(self, graph: CapturedGraph) -> Callable[..., Any]:
        runtime = self.runtime

        def run(*arguments: Any) -> list[Any]:
            return runtime.run(graph, arguments)

        run.graph = graph  # type: ignore[attr-defined]  # tells what Dynamo compiled for this graph from the others
        return run

    def _own_call(self, graph: CapturedGraph) -> Callable[..., Any]:
        runtime = self.runtime
        names = [s[3:-2] if s.startswith("L['") and s.endswith("']") else "" for s in graph.sources]
        found = timestep_argument(names)
        position = found[1] if found else None
        reader = SourceReader(graph.sources, position)
        # A graph that goes on where a break left off belongs to the call that began before it.
        begins = not runtime.after_break(graph)

        def run(*arguments: Any) -> list[Any]:
            if begins:
                runtime.begin_call(arguments[position] if position is not None else None, reader(arguments))
            return runtime.run(graph, arguments)

        return run


def dqar_fx(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The registered backend.

    ``options``: ``schedule`` (required), ``cache``, ``gates``, ``scheduler``, ``sites`` and ``cuda_graphs`` as for
    ``optimize``; ``backend``, ``mode`` and ``options`` for compiling the rewritten pieces.

    Raises:
        RuntimeStateError: no ``schedule``, or an unknown option.
    """
    if options is None or "schedule" not in options:
        raise RuntimeStateError(
            'backend "dqar_fx" needs a schedule: torch.compile(model, backend="dqar_fx", '
            'options={"schedule": dqar_fx.Schedule.interval(50)}).'
        )
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise RuntimeStateError(f'unknown options for backend "dqar_fx": {unknown}. Known: {", ".join(_OPTIONS)}.')
    if isinstance(sites := options.get("sites"), str) and sites == "auto":
        raise RuntimeStateError(
            "sites='auto' calls the model to measure it, and a backend is handed graphs only. Use "
            "dqar_fx.optimize(..., sites='auto'), or measure first: options={..., 'sites': "
            "dqar_fx.tune(model, inputs).sites}."
        )
    runtime = _runtimes.get(id(options))
    if runtime is None:
        runtime = make_runtime(**{"cache": CacheConfig(), **options})
        runtime.origin = options
        _runtimes[id(options)] = runtime
    return CaptureBackend(runtime, delimited=False)(gm, example_inputs)


def make_runtime(
    *,
    schedule: Schedule | Plan,
    cache: CacheConfig,
    gates: Gates | None = None,
    scheduler: Any = None,
    sites: Any = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    cuda_graphs: bool | str = False,
) -> Runtime:
    """A runtime, its arguments checked.

    Raises:
        DqarError: an argument of the wrong kind; the message names it.
    """
    if not isinstance(schedule, (Schedule, Plan)):
        raise RuntimeStateError(
            f"schedule is a {type(schedule).__name__}. Pass a dqar_fx.Schedule (for example Schedule.interval(50)) "
            f"or a Plan."
        )
    if not isinstance(cache, CacheConfig):
        raise RuntimeStateError(
            f"cache is a {type(cache).__name__}. Pass a dqar_fx.CacheConfig, e.g. CacheConfig(dtype='int8')."
        )
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise RuntimeStateError(
            f"scheduler is a {type(scheduler).__name__} without `timesteps`. Pass the pipeline's scheduler, "
            f"pipe.scheduler."
        )
    if gates is not None and not isinstance(gates, Gates):
        raise RuntimeStateError(
            f"gates is a {type(gates).__name__}. Pass a dqar_fx.Gates, e.g. Gates(max_reuse=4), or None for none."
        )
    if gates is not None and scheduler is None and (asks := gates.asks_for_snr):
        raise GateError(
            f"Gates.{asks} is {getattr(gates, asks)}, but nothing tells the signal-to-noise ratio of a step. Pass the "
            f"pipeline's scheduler (scheduler=pipe.scheduler), or leave the gate out ({asks}=None)."
        )
    compiler = resolve_backend(backend, mode, options, dynamic)
    return Runtime(
        schedule, cache, scheduler, sites, compiler, gates=gates, dynamic=bool(dynamic),
        step_graphs=step_graphs(cuda_graphs, compiler),
    )  # fmt: skip


def runtime_of_compiled(model: Any) -> Runtime | None:
    """The runtime behind ``torch.compile(module, backend="dqar_fx")``, once it has captured; None if there is none."""
    callback = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while callback is not None:
        options = getattr(callback, "kwargs", {}).get("options")
        if options is not None and id(options) in _runtimes:
            return _runtimes[id(options)]
        callback = getattr(callback, "_torchdynamo_orig_backend", None) or getattr(
            callback, "_torchdynamo_orig_callable", None
        )
    return None


def _refuse_training(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise CaptureError(
            "the model was called with gradients enabled, and its parameters or inputs require them. A stored "
            "attention has no gradient: call the model under torch.no_grad() or torch.inference_mode()."
        )
    for node in gm.graph.nodes:
        if is_attention(node):
            p = dropout_probability(node)
            active = p > 0
        elif node.op == "call_function" and target_name(node) == "dropout":
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            active = bool(training) and isinstance(p, (int, float)) and p > 0
        else:
            continue
        if active:
            raise CaptureError(
                f"dropout is active ({node.name}, p={p}): a stored attention would freeze it. Call model.eval() first."
            )


def _raising(error: DqarError) -> Callable[..., Any]:
    def run(*_arguments: Any) -> Any:
        raise error

    return run
