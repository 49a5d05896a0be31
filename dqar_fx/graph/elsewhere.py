"""Graphs on the tensors of a device that this machine does not have.

``FakeTensorMode`` accepts any device, but a few Python bindings of torch ask for the device's driver before they
dispatch (``x[i]``, ``x.copy_``), and ``scaled_dot_product_attention`` asks it which kernel to take. ``WithoutDriver``
calls the operators behind them instead, so that AOTAutograd and Inductor go on as they would on that device. What a
function of torch that is written in Python calls in its turn (``multi_head_attention_forward``) is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dqar_fx.graph.capture import fork

aten = torch.ops.aten

#: GPU cores of the Mac that is made up; Inductor asks for them before it looks for tuned matrix products.
MPS_CORES = 10
#: What Inductor asks of the GPU that is made up where there is none: by the data sheet of an H100.
H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 * 2**30, L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip
_DEVICE = {"current_device": 0, "get_device_properties": H100}


class WithoutDriver(TorchFunctionMode):
    """Inside, torch can be called on fake tensors of a device whose driver is not there.

    ``attention``: the operator that ``scaled_dot_product_attention`` comes down to on that device.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__:
            return _index(*args)
        if func is Tensor.__setitem__:
            return aten.copy_(_index(args[0], args[1]), torch.as_tensor(args[2], device=args[0].device))
        if func is Tensor.copy_:
            return aten.copy_(*args, **kwargs)
        if func is Tensor.contiguous:
            return aten.contiguous(*args, **kwargs)
        if func is Tensor.__invert__:
            return aten.bitwise_not(*args)
        if func is Tensor.to:
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(device, (str, torch.device)):
                return aten._to_copy(args[0], device=device, dtype=args[2] if len(args) > 2 else kwargs.get("dtype"))
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(self._attention, *args, **kwargs)
        if "device" in kwargs and _get_current_dispatch_mode() is None:
            # Not traced but done: Inductor folds constants by computing them on one element. Any device will do.
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _index(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` by operators."""
    parts = index if isinstance(index, tuple) else (index,)
    given = sum(1 if not isinstance(i, Tensor) or i.dtype != torch.bool else i.ndim for i in parts if _takes(i))
    dim = 0
    advanced: list[Tensor | None] = []
    for part in parts:
        if part is None:
            x, dim = x.unsqueeze(dim), dim + 1
            advanced.append(None)
        elif part is Ellipsis:
            rest = x.ndim - dim - given
            dim += rest
            advanced += [None] * rest
        elif isinstance(part, slice):
            x = aten.slice(x, dim, part.start, part.stop, 1 if part.step is None else part.step)
            dim, given = dim + 1, given - 1
            advanced.append(None)
        elif isinstance(part, (Tensor, list)):
            where = torch.as_tensor(part, device=x.device)
            width = where.ndim if where.dtype == torch.bool else 1
            dim, given = dim + width, given - width
            advanced.append(where)
        else:
            x, given = aten.select(x, dim, part), given - 1
    return x if all(a is None for a in advanced) else aten.index(x, advanced)


def _takes(part: Any) -> bool:
    return part is not None and part is not Ellipsis


def _attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def pretending(device: str) -> Iterator[None]:
    """Inside, Inductor generates code for fake tensors of ``device`` (mps, cuda) as it would where there is one.

    Nothing is changed where there is one, nor for the CPU. For ``cuda``, triton must be installed.
    """
    with ExitStack() as stack:
        if device == "mps" and not torch.backends.mps.is_available():
            cores = mock.patch.object(torch._C, "_mps_get_core_count", create=True, return_value=MPS_CORES)
            stack.enter_context(cores)
            stack.enter_context(WithoutDriver(aten._scaled_dot_product_attention_math_for_mps))
        if device == "cuda" and not torch.cuda.is_available():
            for patch in _cuda_patches():
                stack.enter_context(patch)
            stack.enter_context(WithoutDriver(_efficient_attention))
        yield


def _cuda_patches() -> list[Any]:
    """An H100, for whoever asks Inductor's description of devices for one."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch.utils import _triton

    answers: dict[Any, dict[str, Any]] = {
        CudaInterface: {"is_available": True, "device_count": 1, "get_compute_capability": 90, **_DEVICE},
        CudaInterface.Worker: _DEVICE,
        torch.cuda: {"get_device_properties": H100, "get_device_capability": (H100.major, H100.minor)},
        # Both ask triton's driver, which there is none of without a GPU; the second is part of a name in a cache.
        scheduler: {"has_triton": True},
        _triton: {"triton_hash_with_backend": "none"},
    }
    return [
        mock.patch.object(where, name, return_value=answer)
        for where, given in answers.items()
        for name, answer in given.items()
    ]


def _efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool,
    *, scale: float | None,
) -> Any:  # fmt: skip
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, False, dropout, is_causal, scale=scale)


def moved(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """``gm`` with every device that stands in it replaced by ``device``; example values stay as they are."""
    out = fork(gm)
    for node in out.graph.nodes:
        node.args, node.kwargs = _on(node.args, device), _on(node.kwargs, device)
    out.recompile()
    return out


def _on(value: Any, device: torch.device) -> Any:
    return fx.node.map_aggregate(value, lambda v: device if isinstance(v, torch.device) else v)


def like(value: Any, device: torch.device, mode: FakeTensorMode) -> Any:
    """A fake tensor on ``device`` of the size, strides and dtype of ``value``; what is no tensor, as it is."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
