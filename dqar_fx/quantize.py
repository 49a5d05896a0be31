"""Symmetric INT8 and INT4 quantisation as plain torch operations, which a compiler can fuse into their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from dqar_fx.config import GRANULARITIES
from dqar_fx.errors import CacheError

#: Largest magnitude of the symmetric range; -128 is not used, so that negation is exact.
QMAX = 127
#: The same for four bits; stored with 8 added, two to a byte.
QMAX4 = 7
_OFFSET = 8


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


def quantize(
    x: Tensor, granularity: str = "token", *, num_heads: int | None = None, bits: int = 8, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric INT8: ``scale = max|x| / 127``, ``q = clip(round(x / scale), -127, 127)`` (DQAR, quantised cache).

    Args:
        x: ``[B, ..., N, D]``, floating point, any dtype; two dimensions at least.
        granularity: the values that share a scale. For ``[B, N, D]``: ``token`` (scales ``[B, N, 1]``), ``tensor``
            (``[B, 1, 1]``: per sample, never across the batch), ``channel`` (``[B, 1, D]``: over the tokens), ``head``
            (``[B, 1, H]`` with ``num_heads=H``, channels of a head adjacent; ``[B, H, 1, 1]`` for a ``[B, H, N, d]``
            without it).
        num_heads: number of heads in the last dimension; only ``head`` reads it.
        bits: 8, or 4: ``scale = max|x| / 7``, ``q`` in -7 .. 7, two adjacent values of the last dimension in one byte.
        group: with 4 bits, how many adjacent channels share a scale (the last group may be smaller); None: all of a
            token.

    Returns:
        ``q``, int8, of the shape of ``x``, and ``scale``, float32. With 4 bits ``q`` is uint8
        ``[B, ..., N, ceil(D/2)]`` and ``scale`` ``[B, ..., N, ceil(D/group)]``. ``|x - q * scale| <= scale / 2`` up to
        float32 round-off; zeros stay zeros (scale 0). A group that holds a NaN or an infinity gets the scale NaN, so
        all of it comes back as NaN: the damage is seen, not hidden.

    Raises:
        CacheError: not floating point, neither 8 nor 4 bits, 4 bits with another granularity than ``token``, a group
            that is no positive number or without 4 bits, or as ``scale_shape``.
    """
    if not x.is_floating_point():
        raise CacheError(f"cannot quantise a tensor of dtype {x.dtype}: floating point is needed.")
    if bits not in (8, 4) or (bits == 8 and group is not None) or (group is not None and group < 1):
        raise CacheError(f"bits={bits} with group={group}: use 8 bits, or 4 bits with a positive group or None.")
    scale_shape(tuple(x.shape), granularity, num_heads)  # refuses what has no meaning
    if bits == 4:
        if granularity != "token":
            raise CacheError(f"granularity is {granularity!r}; 4 bits have scales per token or per group of channels.")
        return pack_over(x, x.shape[-1], group or x.shape[-1])
    num_heads = num_heads if granularity == "head" else None
    return quantize_over(x, reduced_dims(x.ndim, granularity, num_heads), num_heads)


def dequantize(
    q: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    size: int | None = None,
    group: int | None = None,
) -> Tensor:
    """``q * scale`` in ``dtype``; ``scale`` as ``quantize`` returned it (any granularity).

    Shapes: ``q [B, ..., N, D]`` int8, ``scale`` float32 -> ``[B, ..., N, D]`` of ``dtype``. Of packed values (uint8
    ``[B, ..., N, ceil(D/2)]``), ``size`` is ``D`` (needed where it is odd) and ``group`` what ``quantize`` was given.

    Raises:
        CacheError: packed values whose ``size`` or ``group`` do not fit the shapes of ``q`` and ``scale``.
    """
    if q.dtype == torch.uint8:
        size = 2 * q.shape[-1] if size is None else size
        fits = (size + 1) // 2 == q.shape[-1] and scale.shape[-1] == -(-size // (group or size))
        if not fits:
            raise CacheError(
                f"size={size} and group={group} do not fit packed values {list(q.shape)} with scales "
                f"{list(scale.shape)}. Give what quantize was given."
            )
        return unpack_from(q, scale, dtype, size, group or size)
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


def pack_over(x: Tensor, size: int, group: int) -> tuple[Tensor, Tensor]:
    """``quantize`` to 4 bits with the question of the layout settled: ``size`` channels, ``group`` of them a scale."""
    values = x.float()
    groups = -(-size // group)
    if groups * group != size:
        values = torch.nn.functional.pad(values, (0, groups * group - size))
    split: Tensor = values.unflatten(-1, (groups, group))  # type: ignore[no-untyped-call]  # torch's own
    scale = _scale(split, (-1,), QMAX4)
    levels = (_levels(split, scale, QMAX4) + _OFFSET).to(torch.uint8).flatten(-2)
    if groups * group != size + size % 2:
        levels = torch.nn.functional.pad(levels, (0, size + size % 2 - groups * group))  # or cut, if that is negative
    pairs: Tensor = levels.unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]  # torch's own
    return pairs[..., 0] | (pairs[..., 1] << 4), scale.squeeze(-1)


def unpack_from(q: Tensor, scale: Tensor, dtype: torch.dtype, size: int, group: int) -> Tensor:
    """``dequantize`` from 4 bits with the question of the layout settled."""
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=q.device)
    levels = ((q.unsqueeze(-1) >> shifts) & 15).flatten(-2)
    # The subtraction keeps the order of the strides, where a conversion of what was cut off would not.
    values = (levels[..., :size] - float(_OFFSET)).float()
    if group < size:
        scale = scale.unsqueeze(-1).expand((-1,) * scale.ndim + (group,)).flatten(-2)[..., :size]
    return (values * scale).to(dtype)


def _scale(values: Tensor, dims: tuple[int, ...], largest_level: int = QMAX) -> Tensor:
    magnitude = values.abs()
    largest = magnitude.amax(dims, keepdim=True) if dims else magnitude  # amax over () would mean over everything
    return torch.where(largest.isfinite(), largest / largest_level, torch.nan)


def _round(values: Tensor, scale: Tensor) -> Tensor:
    return _levels(values, scale, QMAX).to(torch.int8)


def _levels(values: Tensor, scale: Tensor, largest_level: int) -> Tensor:
    divisor = torch.where(scale == 0, 1.0, scale)
    return (values / divisor).round().clamp(-largest_level, largest_level)
