"""Modes that count what the host asks of the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: What makes the host wait for the device.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
}
#: What FLOP are counted of, beside attentions.
PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "linear", "convolution", "matmul"}


class CountsReads(TorchDispatchMode):
    """Counts the operators that read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or Dynamo would step aside for as long as the mode is active

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        # float64: numpy's numbers (Cosmos takes a square root by numpy), which Dynamo traces as tensors of the host.
        self.reads += func in READS and args[0].dtype is not torch.float64
        return func(*args, **(kwargs or {}))


class CountsProducts(TorchDispatchMode):
    """Counts the matrix products, convolutions and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().partition("::")[2].partition(".")[0]
        self.products += name in PRODUCTS or "scaled_dot_product" in name
        return func(*args, **(kwargs or {}))
