"""Symmetric INT8 quantisation as plain torch operations, so that a compiler can fuse it into its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from dqar_fx.config import GRANULARITIES
from dqar_fx.errors import CacheError

#: Largest magnitude of the symmetric range; -128 is not used, so that negation is exact.
QMAX = 127


def scale_shape(shape: tuple[int, ...], granularity: str, num_heads: int | None = None) -> tuple[int, ...]:
    """Shape of the scales of a tensor of ``shape``; see ``quantize``.

    Raises:
        CacheError: unknown granularity, fewer than two dimensions, or ``head`` where the heads cannot be told apart.
    """
    if granularity not in GRANULARITIES:
        raise CacheError(f"granularity is {granularity!r}. Use one of {', '.join(GRANULARITIES)}.")
    if len(shape) < 2:
        raise CacheError(f"cannot quantise a tensor of shape {tuple(shape)}: at least [batch, channels] is needed.")
    if granularity == "token":
        return (*shape[:-1], 1)
    if granularity == "tensor":
        return (shape[0],) + (1,) * (len(shape) - 1)
    if granularity == "channel":
        return (*shape[:-2], 1, shape[-1]) if len(shape) > 2 else tuple(shape)
    if num_heads is None and len(shape) == 4:
        return (shape[0], shape[1], 1, 1)
    if num_heads is None or shape[-1] % num_heads:
        raise CacheError(
            f"granularity='head' needs [B, H, N, d], or num_heads dividing the last dimension; got shape "
            f"{tuple(shape)} and num_heads={num_heads}. Pass num_heads, or use granularity='token'."
        )
    return (shape[0],) + (1,) * (len(shape) - 2) + (num_heads,)


def quantize(x: Tensor, granularity: str = "token", *, num_heads: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric INT8: ``scale = max|x| / 127``, ``q = clip(round(x / scale), -127, 127)`` (DQAR, quantised cache).

    Args:
        x: ``[B, ..., N, D]``, floating point, any dtype; two dimensions at least.
        granularity: the values that share a scale. For ``[B, N, D]``: ``token`` (scales ``[B, N, 1]``), ``tensor``
            (``[B, 1, 1]``: per sample, never across the batch), ``channel`` (``[B, 1, D]``: over the tokens), ``head``
            (``[B, 1, H]`` with ``num_heads=H``, channels of a head adjacent; ``[B, H, 1, 1]`` for a ``[B, H, N, d]``
            without it).
        num_heads: number of heads in the last dimension; only ``head`` reads it.

    Returns:
        ``q``, int8, of the shape of ``x``, and ``scale``, float32. ``|x - q * scale| <= scale / 2`` up to float32
        round-off; zeros stay zeros (scale 0). A group that holds a NaN or an infinity gets the scale NaN, so all of it
        comes back as NaN: the damage is seen, not hidden.

    Raises:
        CacheError: not floating point, or as ``scale_shape``.
    """
    if not x.is_floating_point():
        raise CacheError(f"cannot quantise a tensor of dtype {x.dtype}: floating point is needed.")
    scale_shape(tuple(x.shape), granularity, num_heads)  # refuses what has no meaning
    num_heads = num_heads if granularity == "head" else None
    return quantize_over(x, reduced_dims(x.ndim, granularity, num_heads), num_heads)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * scale`` in ``dtype``; ``scale`` as ``quantize`` returned it (any granularity).

    Shapes: ``q [B, ..., N, D]`` int8, ``scale`` float32 -> ``[B, ..., N, D]`` of ``dtype``.
    """
    per_head = scale.shape[-1] not in (1, q.shape[-1])
    return dequantize_from(q, scale, dtype, scale.shape[-1] if per_head else None)


def reduced_dims(ndim: int, granularity: str, num_heads: int | None = None) -> tuple[int, ...]:
    """The dimensions that share one scale, for a tensor of ``ndim`` dimensions whose heads (if any) are dimension 1.

    With ``num_heads``: of the tensor whose last dimension has been split into heads and channels.
    """
    if granularity == "head" and num_heads is not None:
        return (*range(1, ndim - 1), ndim)
    return {
        "token": (ndim - 1,),
        "tensor": tuple(range(1, ndim)),
        "channel": (ndim - 2,) if ndim > 2 else (),
        "head": tuple(range(2, ndim)),
    }[granularity]


def quantize_over(x: Tensor, dims: tuple[int, ...], num_heads: int | None = None) -> tuple[Tensor, Tensor]:
    """``quantize`` with the question of the layout settled: no branch on data or shape, so that it can be traced."""
    # float32 throughout: in float16 the division by 127 would underflow to a zero scale for small inputs.
    values = x.float()
    if num_heads is None:
        scale = _scale(values, dims)
        return _round(values, scale), scale
    split: Tensor = values.unflatten(-1, (num_heads, -1))  # type: ignore[no-untyped-call]  # torch's own
    scale = _scale(split, dims)
    return _round(split, scale).flatten(-2), scale.squeeze(-1)


def dequantize_from(q: Tensor, scale: Tensor, dtype: torch.dtype, num_heads: int | None = None) -> Tensor:
    """``dequantize`` with the question of the layout settled."""
    if num_heads is None:
        return (q.float() * scale).to(dtype)
    split: Tensor = q.float().unflatten(-1, (num_heads, -1))  # type: ignore[no-untyped-call]  # torch's own
    return (split * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def _scale(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    magnitude = values.abs()
    largest = magnitude.amax(dims, keepdim=True) if dims else magnitude  # amax over () would mean over everything
    return torch.where(largest.isfinite(), largest / QMAX, torch.nan)


def _round(values: Tensor, scale: Tensor) -> Tensor:
    divisor = torch.where(scale == 0, 1.0, scale)
    return (values / divisor).round().clamp(-QMAX, QMAX).to(torch.int8)
