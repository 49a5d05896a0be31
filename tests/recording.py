"""A recorder for tests without a CUDA device: what it records are ATen operators and the tensors they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Operators with their very arguments, as a CUDA graph keeps kernels with their addresses.

    As in a capture nothing takes effect: what exists already is not written into, new tensors hold no values, and
    reading one fails. Whatever is not repeated at a replay therefore shows in the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        with self:  # in inference mode, compound operators come as they are; some return views, or not
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        schema = func._schema
        given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
        if schema.is_mutable:
            self.calls.append((func, args, kwargs, []))
            written = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            return written[0] if len(schema.returns) == 1 else tuple(written) or None
        result = func(*args, **kwargs)
        if any(r.alias_info is not None for r in schema.returns):  # a view: it is where it is
            return result
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()
        self.calls.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                result = func(*args, **kwargs)
                for tensor, value in zip(made, [v for v in tree_leaves(result) if isinstance(v, Tensor)], strict=False):
                    tensor.copy_(value)


class FakeRecorder:
    """What ``StepGraphs`` uses in place of CUDA.

    Attributes:
        failures: exceptions to raise, one for each recording to come.
        busy: somebody else is recording.
        recorded: how many were made, ``trimmed``: how often memory was given back.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.failures: list[Exception] = []
        self.busy = False
        self.recorded = self.trimmed = self.waits = 0

    def is_busy(self) -> bool:
        return self.busy

    def wait(self, static: Iterable[Tensor]) -> None:
        assert all(isinstance(tensor, Tensor) for tensor in static)
        self.waits += 1

    def record(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        recording = Recording()
        with recording:
            results = run()
            if self.failures:
                raise self.failures.pop(0)
        self.recorded += 1
        return recording.replay, results

    def trim(self) -> None:
        self.trimmed += 1
