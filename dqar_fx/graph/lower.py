"""Compile specialised pieces, each once, on first need, with any Dynamo backend.

Pieces are compiled when they first run, outside of Dynamo's tracing context: inside the backend call, Inductor would trip
over Dynamo's shape environment, and most (piece, outcome) pairs of a schedule are never needed by most steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dqar_fx.graph.capture import fork
from dqar_fx.graph.specialise import Variant

logger = logging.getLogger(__name__)

#: Takes a list of arguments, which it may empty, and returns the outputs.
BoxedCallable = Callable[[list[Any]], Sequence[Any]]
Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def resolve_backend(
    backend: str | Callable[..., Any],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Backend:
    """The callable that ``torch.compile`` would use for the same four arguments."""
    if backend == "inductor":
        return torch._TorchCompileInductorWrapper(mode, dict(options) if options else None, dynamic)  # type: ignore[no-untyped-call]
    return torch._TorchCompileWrapper(backend, mode, dict(options) if options else None, dynamic)  # type: ignore[no-untyped-call]


def signature(arguments: Sequence[Any]) -> Hashable:
    """What a compiled piece may rely on: type, shape, strides, dtype and device of tensors, the value of the rest."""
    described: list[Hashable] = [torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
    for value in arguments:
        if isinstance(value, torch.Tensor):
            described.append(
                (type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_inference())
            )
        else:
            described.append((type(value), value))
    return tuple(described)


class Lowerer:
    """All compiled pieces of one optimised model, found by what they compute and what they are given."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._compiled: dict[tuple[int, Hashable], BoxedCallable] = {}
        self._variants: list[Variant] = []  # keeps the ids in the keys unique
        self._lock = threading.Lock()
        self.seconds = 0.0
        #: Called after each compilation with the number of compiled pieces so far.
        self.on_compile: Callable[[int], None] | None = None

    @property
    def count(self) -> int:
        """How many (piece, outcome, input signature) have been compiled."""
        return len(self._compiled)

    def lower(self, variant: Variant, arguments: Sequence[Any]) -> BoxedCallable:
        """The compiled form of ``variant`` for arguments like these (shapes, strides, dtypes, devices)."""
        key = (id(variant), signature(arguments))
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    compiled = self._compile(variant, arguments)
                    self._variants.append(variant)
                    self._compiled[key] = compiled
            if self.on_compile is not None:
                self.on_compile(len(self._compiled))
        return compiled

    def _compile(self, variant: Variant, arguments: Sequence[Any]) -> BoxedCallable:
        started = time.perf_counter()
        gm = fork(variant.gm)
        numbers = _bake_numbers(gm, arguments)
        for node in gm.graph.nodes:
            # Fake tensors of Dynamo's (finished) fake mode would clash with those of the compilation that starts here.
            node.meta.pop("example_value", None)
            node.meta.pop("grapharg", None)
        tensors = [a for i, a in enumerate(arguments) if i not in numbers]
        compiled = boxed(self._backend(gm, tensors))
        self.seconds += time.perf_counter() - started
        logger.info("compiled a piece of %d nodes in %.2f s", len(gm.graph.nodes), time.perf_counter() - started)
        if not numbers:
            return compiled

        def without_numbers(given: list[Any]) -> Sequence[Any]:
            tensors = [a for i, a in enumerate(given) if i not in numbers]
            given.clear()
            return compiled(tensors)

        return without_numbers


def _bake_numbers(gm: fx.GraphModule, arguments: Sequence[Any]) -> frozenset[int]:
    """Write arguments that are plain numbers (sizes) into the graph: a piece is compiled for given sizes anyway."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    numbers = frozenset(i for i, a in enumerate(arguments) if not isinstance(a, torch.Tensor))
    for i in numbers:
        node, value = placeholders[i], arguments[i]
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda n, node=node, value=value: value if n is node else n)
            user.kwargs = fx.map_arg(user.kwargs, lambda n, node=node, value=value: value if n is node else n)
        gm.graph.erase_node(node)
    gm.recompile()
    return numbers


def boxed(function: Callable[..., Any]) -> BoxedCallable:
    """``function`` as a callable of one list of arguments.

    AOTAutograd's function takes a list that it empties, so that arguments are freed as soon as they are not needed; what
    it returns wraps that in one of ``*args``, which keeps every argument alive until the end. Take the inner one where
    there is one.
    """
    inner = getattr(function, "__wrapped__", None)
    if getattr(inner, "_boxed_call", False):
        return inner  # type: ignore[no-any-return]
    if getattr(function, "_boxed_call", False):
        return function
    return lambda arguments: function(*arguments)


