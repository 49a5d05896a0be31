"""Compile specialised pieces, each once, on first need, with any Dynamo backend.

Pieces are compiled when they first run, outside of Dynamo's tracing context: inside the backend call, Inductor would
trip over Dynamo's shape environment, and most (piece, outcome) pairs of a schedule are never needed by most steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dqar_fx.graph.calling import BoxedCallable, boxed, direct, needs_nothing_around
from dqar_fx.graph.capture import fork
from dqar_fx.graph.compile_line import compile_line
from dqar_fx.graph.effects import finds_size
from dqar_fx.graph.host_memory import keep_freed_memory
from dqar_fx.graph.overlap import is_possible, overlapping
from dqar_fx.graph.specialise import Variant

logger = logging.getLogger(__name__)

_NO_ASSERTS = {"size_asserts": False, "alignment_asserts": False}

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def resolve_backend(
    backend: str | Callable[..., Any],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Backend:
    """The callable that ``torch.compile`` would use for the same four arguments.

    Inductor's checks of every argument's size at every call are off (``options`` can turn them on again): Dynamo's
    guards hold the inputs of the model, the program fixed all others when it first ran, and with a piece per block
    these checks would be a tenth of the host time of a small model.
    """
    if backend == "inductor":
        settings = {**_NO_ASSERTS, **(options or {})}
        return torch._TorchCompileInductorWrapper(mode, settings, dynamic)  # type: ignore[no-untyped-call]
    return torch._TorchCompileWrapper(backend, mode, dict(options) if options else None, dynamic)  # type: ignore[no-untyped-call]


def signature(arguments: Sequence[Any], *, sizes: bool = True) -> Hashable:
    """What a compiled piece may rely on: all about its tensors but their values, the value of the rest, the modes.

    Without ``sizes``, neither shapes and strides nor numbers: of these only how many dimensions, and which type.
    """
    described: list[Hashable] = [torch.is_inference_mode_enabled()]
    devices = set()
    for value in arguments:
        if isinstance(value, torch.Tensor):
            devices.add(value.device.type)
            layout = (value.shape, value.stride()) if sizes else (value.ndim,)
            kind = (type(value), value.dtype, value.device, value.requires_grad, value.is_inference())
            described.append((*kind, *layout))
        else:
            described.append((type(value), value if sizes or isinstance(value, bool) else None))
    # Under autocast the same graph is other kernels.
    described += [(d, torch.get_autocast_dtype(d)) for d in sorted(devices) if _autocast(d)]
    return tuple(described)


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class Lowerer:
    """All compiled pieces of one optimised model, found by what they compute and what they are given.

    Args:
        backend: compiles a piece.
        dynamic: a piece is compiled once for all sizes (where it must be at all: sizes 0 and 1 are others).
    """

    def __init__(self, backend: Backend, *, dynamic: bool = False) -> None:
        self._backend = backend
        self._dynamic = dynamic
        self._is_inductor = isinstance(backend, torch._TorchCompileInductorWrapper)
        self._compiled: dict[tuple[int, Hashable], BoxedCallable] = {}
        self._direct: dict[BoxedCallable, BoxedCallable] = {}
        self._variants: list[Variant] = []  # keeps the ids in the keys unique
        self._lock = threading.RLock()
        self._count = 0
        self.seconds = 0.0
        #: How many of the pieces run as they are: they find a size from values, which is nothing to compile.
        self.uncompiled = 0

    @property
    def rounds_differently(self) -> bool:
        """True if compiled pieces may differ from torch in the last bit anyway."""
        return self._is_inductor

    @property
    def overlaps(self) -> bool:
        """True if pieces for the CPU can be compiled with ``overlapping``: by Inductor, with none but our settings."""
        mine = getattr(self._backend, "config", {})
        return self._is_inductor and not self._dynamic and not set(mine) - set(_NO_ASSERTS) and is_possible()

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Inside, pieces are lowered and must not be called; on leaving, their C++ compilers have been waited for."""
        with ExitStack() as stack:
            stack.enter_context(overlapping())
            yield
            started = time.perf_counter()
            with compile_line(self._count, self.seconds):
                stack.close()
            self.seconds += time.perf_counter() - started

    @property
    def overwrites_results(self) -> bool:
        """True if compiled pieces replay CUDA graphs, whose results last until the next replay only."""
        return bool(getattr(self._backend, "config", {}).get("triton.cudagraphs", inductor_config.triton.cudagraphs))

    @property
    def count(self) -> int:
        """How often a piece has been compiled: once for each outcome and kind of input, if need be for each size."""
        return self._count

    def lower(self, variant: Variant, arguments: Sequence[Any]) -> BoxedCallable:
        """The compiled form of ``variant`` for arguments like these (shapes, strides, dtypes, devices)."""
        return self._lower(variant, arguments, sizes=not self._dynamic)

    def direct(self, compiled: BoxedCallable) -> BoxedCallable:
        """What may be called from the second call on in place of ``compiled``, which ``lower`` returned."""
        return self._direct.get(compiled, compiled)

    def _lower(self, variant: Variant, arguments: Sequence[Any], *, sizes: bool) -> BoxedCallable:
        key = (id(variant), signature(arguments, sizes=sizes))
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    compiled = self._compile(variant, arguments, sizes=sizes)
                    self._variants.append(variant)
                    self._compiled[key] = compiled
        return compiled

    def _compile(self, variant: Variant, arguments: Sequence[Any], *, sizes: bool) -> BoxedCallable:
        if all(a.device.type == "cpu" for a in arguments if isinstance(a, torch.Tensor)):
            keep_freed_memory()
        gm = fork(variant.gm)
        as_it_is = any(finds_size(node) for node in gm.graph.nodes)
        # Without sizes the numbers stay arguments: Dynamo knows which of them are symbols, and what it assumed of them.
        numbers = _bake_numbers(gm, arguments) if sizes else frozenset[int]()
        for node in gm.graph.nodes:
            # Fake tensors of Dynamo's (finished) fake mode would clash with those of the compilation that starts here.
            node.meta.pop("example_value", None)
            node.meta.pop("grapharg", None)
            node.meta.pop("unbacked_bindings", None)  # sizes that were found are given here, and are numbers
        if sizes:
            _tell_tensors(gm)
        if as_it_is:
            self.uncompiled += 1
            self._count += 1
            compiled: BoxedCallable = lambda given: gm.forward(*given)  # noqa: E731  # one of three
        elif sizes:
            tensors = [a for i, a in enumerate(arguments) if i not in numbers]
            # (With numbers among the arguments, positions would not be what they were.)
            bare = (
                self._is_inductor
                and not self.overwrites_results
                and not numbers
                and needs_nothing_around(gm, tensors, len(variant.inputs))
            )
            function = self._counted(gm, tensors)
            # With parameters of its own (a higher-order operator's body) only the outer function knows to pass them.
            own = any(True for _ in gm.parameters()) or any(True for _ in gm.buffers())
            compiled = (lambda given: function(*given)) if own else boxed(function)
            if bare and not own:
                results = len(next(n for n in gm.graph.nodes if n.op == "output").args[0])
                self._direct[compiled] = direct(function, results) or compiled
        else:
            compiled = self._for_all_sizes(variant, gm)
        if not numbers:
            return compiled

        def without_numbers(given: list[Any]) -> Sequence[Any]:
            tensors = [a for i, a in enumerate(given) if i not in numbers]
            given.clear()
            return compiled(tensors)

        return without_numbers

    def _for_all_sizes(self, variant: Variant, gm: fx.GraphModule) -> BoxedCallable:
        """``gm`` as Dynamo compiles it with symbolic sizes; for each size apart, if it cannot trace its graph again.

        (Of a higher-order operator it cannot: its arguments are no longer those of the function that a user calls.)
        """
        function = torch.compile(gm, backend=self._counted, dynamic=True, fullgraph=True)
        refused = False

        def run(given: list[Any]) -> Sequence[Any]:
            nonlocal refused
            if not refused:
                try:
                    result: Sequence[Any] = function(*given)
                except torch._dynamo.exc.TorchDynamoException as error:  # while it traces: nothing has run yet
                    logger.info("a piece is compiled for each size: %s", str(error).split("\n", 1)[0])
                    refused = True
                else:
                    return result
            return self._lower(variant, given, sizes=True)(given)

        return run

    def _counted(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        with compile_line(self._count + 1, self.seconds), ExitStack() as stack:
            if self._is_inductor:
                inputs = _as_dynamo_gives_them(inputs, stack)
            function = self._backend(gm, inputs)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        logger.info("compiled a piece of %d nodes in %.2f s", len(gm.graph.nodes), seconds)
        self._count += 1
        return function


def _as_dynamo_gives_them(inputs: Sequence[Any], stack: ExitStack) -> Sequence[Any]:
    """``inputs`` as fake tensors of fixed sizes, in what Dynamo has around a compilation, until ``stack`` is left.

    Inductor looks into its caches on disk only where there is a shape environment, though it be empty; and it takes the
    sizes of real tensors for open ones then.
    """
    if torch._guards.TracingContext.try_get() is not None or any(isinstance(x, FakeTensor) for x in inputs):
        return inputs  # Dynamo's own, where sizes are open; fake tensors bring their mode
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(mode)))
    return [mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x for x in inputs]


def _tell_tensors(gm: fx.GraphModule) -> None:
    """Mark what methods are called of as tensors, as Dynamo does: the cache of AOTAutograd takes no others.

    It looks for an example value, whatever that is.
    """
    for node in gm.graph.nodes:
        if node.op == "call_method" and isinstance(node.args[0], fx.Node):
            node.args[0].meta["example_value"] = None


def _bake_numbers(gm: fx.GraphModule, arguments: Sequence[Any]) -> frozenset[int]:
    """Write arguments that are plain numbers (sizes) into the graph: a piece is compiled for given sizes anyway."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    numbers = {placeholders[i]: (i, a) for i, a in enumerate(arguments) if not isinstance(a, torch.Tensor)}

    def value(node: fx.Node) -> Any:
        return numbers[node][1] if node in numbers else node

    for node in gm.graph.nodes:
        node.args, node.kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    for node in numbers:
        gm.graph.erase_node(node)
    gm.recompile()
    return frozenset(i for i, _ in numbers.values())
