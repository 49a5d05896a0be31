"""Attention entropy (DQAR, R1 and C2): how widely a layer looks, exactly, from its queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from dqar_fx.errors import MetricError
from dqar_fx.metrics.row_entropy import row_entropy

NORMALIZATIONS = ("row", "keys", "sum")
#: A key whose mask lies this far (in nats) below that of the best key of its row is out: diffusers adds -10000 for it.
OUT = 1000.0
#: 2**16 over the golden ratio: multiples of it, modulo 2**16, fill the range evenly at any count.
GOLDEN, RANGE = 40503, 65536


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    normalize: str = "row",
    rows: int | None = None,
) -> Tensor:
    """Entropy in nats of ``softmax(scale * q k^T + mask)``, per sample: ``H_i = -sum_j A_ij ln A_ij``.

    DQAR's ``-1/(H N) sum_h sum_ij A ln(A + eps)`` (S2, S3), without its eps. No tensor of queries times keys is made
    where the device has a kernel that returns the log-sum-exp (``row_entropy`` says which, and the error).

    Args:
        q: queries ``[B, H, N, D]``, floating point.
        k: keys ``[B, H, M, D]`` of the same dtype and device; fewer heads than ``q`` if they divide its heads (GQA).
        scale: factor of the scores; ``D ** -0.5`` if None.
        mask: as scaled dot product attention takes it: bool (True takes part) or floating point (added to the scores),
            broadcasting to ``[B, H, N, M]``.
        is_causal: row ``i`` sees the keys up to ``i``; not together with a mask.
        normalize: ``"row"`` is the mean over heads and rows, in ``[0, ln M]``; ``"keys"`` the mean of each row's
            entropy over ``ln`` of the number of keys that the mask leaves it, in ``[0, 1]`` (1 is uniform attention at
            any size; a row of one key counts as 0); ``"sum"`` is summed over rows, per head.
        rows: look at this many rows only (all if None or more than there are), one from each of ``rows`` equal parts,
            always the same ones. The standard error of ``"row"`` is at most ``std(h_i) / sqrt(rows)``, ``h_i`` being a
            row's mean over heads; less where neighbouring rows are alike. ``"sum"`` is scaled to all rows.

    Returns:
        ``[B]``, for ``"sum"`` ``[B, H]``; float32, or float64 for float64 queries. A row to which the mask leaves no
        key has no distribution: it is left out of the mean, and adds 0 to a sum; a sample without any other is 0.

    Raises:
        MetricError: shapes, dtypes or devices that do not fit together, or an unknown ``normalize``.
    """
    _check(q, k, mask, is_causal, normalize, rows)
    return entropy_in_graph(q, k, mask, is_causal, scale, q.shape[1] != k.shape[1], normalize=normalize, rows=rows)


def entropy_in_graph(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001  # heads say so themselves; taken to be called as the attention was
    *,
    normalize: str = "row",
    rows: int | None = None,
) -> Tensor:
    """``attention_entropy`` with the arguments of ``scaled_dot_product_attention``, less the values, to be traced.

    Nothing is checked and no branch depends on data, so Dynamo, ``make_fx`` and Inductor take it as it stands.

    Shapes: ``query [..., H, N, D]``, ``key [..., H, M, D]`` of three dimensions or more, the first of them samples
    (three dimensions: one head) -> ``[B]``, or ``[B, H]`` for ``"sum"``; float32, float64 for float64. Sizes may be
    symbolic, but are fixed by the trace where rows are taken block by block (``row_entropy``).
    """
    q, k, mask = _four_dimensions(query.detach(), key.detach(), attn_mask)
    every_row, keys = q.shape[-2], k.shape[-2]
    if rows is not None and rows < every_row:
        q, mask = _sample(q, mask, is_causal, rows, keys)
        is_causal = False  # it is in the mask now
    entropy = row_entropy(q, k, mask, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
    left = _keys_left(q, keys, mask, is_causal)
    if normalize == "keys":
        entropy = entropy / left.clamp(min=2).to(entropy.dtype).log()
    has_keys = (left > 0).expand(entropy.shape)
    entropy = torch.where(has_keys, entropy, 0)
    if normalize == "sum":
        return entropy.sum(-1) * (every_row / q.shape[-2])
    return entropy.sum((1, 2)) / has_keys.sum((1, 2)).clamp(min=1)


def _four_dimensions(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``[B, H, N, D]``, keys with as many heads as queries, and a mask of four dimensions, the last of them ``M``."""
    if mask is not None:
        mask = mask.reshape(*[1] * (q.ndim - mask.ndim), *mask.shape)
        mask = mask.expand(*mask.shape[:-1], k.shape[-2])
    if q.ndim == 3:
        q, k = q[:, None], k[:, None]
        mask = None if mask is None else mask[:, None]
    elif q.ndim > 4:
        if mask is not None:
            mask = mask.expand(*q.shape[:-2], *mask.shape[-2:]).flatten(1, -3)
        k = k.expand(*q.shape[:-3], *k.shape[-3:])
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3).flatten(1, -3)
        q = q.flatten(1, -3)
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q, k.expand(q.shape[0], -1, -1, -1), mask


def _sample(q: Tensor, mask: Tensor | None, is_causal: bool, rows: int, keys: int) -> tuple[Tensor, Tensor | None]:
    """``rows`` rows of the queries, and of the mask where it tells rows apart.

    One from each of ``rows`` equal parts, at a place that moves by the golden ratio: at a constant step, all of them
    could lie in one column of the image. In integers, so that every compiler picks the same ones.
    """
    part = torch.arange(rows, device=q.device)
    index = (part * RANGE + part * GOLDEN % RANGE) * q.shape[-2] // (rows * RANGE)
    if is_causal:
        mask = (torch.arange(keys, device=q.device) <= index[:, None])[None, None]
    elif mask is not None and mask.shape[-2] != 1:
        mask = mask.index_select(-2, index)
    return q.index_select(-2, index), mask


def _keys_left(q: Tensor, keys: int, mask: Tensor | None, is_causal: bool) -> Tensor:
    """How many keys each row may attend to: integers that broadcast to ``[B, H, N]``."""
    if is_causal:
        return torch.arange(1, q.shape[-2] + 1, device=q.device).clamp(max=keys)[None, None]
    if mask is None:
        return torch.full((1, 1, 1), keys, device=q.device)
    if mask.dtype != torch.bool:
        # The difference first: less 1000, the lowest number of a dtype is itself. A NaN counts as a key, to be seen.
        mask = ~((mask - mask.amax(-1, keepdim=True) < -OUT) | (mask == -torch.inf))
    return mask.sum(-1)


def _check(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, normalize: str, rows: int | None) -> None:
    if normalize not in NORMALIZATIONS:
        raise MetricError(f"normalize is {normalize!r}. Use one of {', '.join(NORMALIZATIONS)}.")
    if rows is not None and rows < 1:
        raise MetricError(f"rows is {rows}: at least one row must be looked at. Pass None for all of them.")
    got = f"q is {q.dtype} {tuple(q.shape)} on {q.device}, k is {k.dtype} {tuple(k.shape)} on {k.device}"
    if not (q.is_floating_point() and q.dtype == k.dtype and q.device == k.device):
        raise MetricError(f"{got}: one floating point dtype and one device are needed.")
    fits = q.ndim == k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or 0 in (*q.shape, *k.shape) or q.shape[1] % k.shape[1]:
        raise MetricError(f"{got}: pass q [B, H, N, D] and k [B, H, M, D], none empty, the heads of k dividing H.")
    if mask is None:
        return
    if is_causal:
        raise MetricError("is_causal and a mask exclude each other. Put the causal part into the mask.")
    if mask.device != q.device or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise MetricError(
            f"mask is {mask.dtype} on {mask.device}, queries are on {q.device}. Pass a bool mask (True takes part) or "
            "a floating point one (added), on the device of the queries."
        )
    scores = (*q.shape[:3], k.shape[2])
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.ndim > 4 or any(m not in (1, s) for m, s in sizes):
        raise MetricError(f"mask of shape {tuple(mask.shape)} does not broadcast to [B, H, N, M] = {scores}.")
