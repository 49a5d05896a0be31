"""Entropy of each row of an attention, without a tensor of queries times keys.

``H_i = lse_i - E_i[s]`` with the scores ``s_ij = scale * q_i . k_j + b_ij``, ``lse_i`` their log-sum-exp and ``E_i``
the mean under the attention ``A_i = softmax(s_i)``. As ``E_i[q_i . k] = q_i . (A K)_i``, an attention kernel that is
given the keys as values and returns its log-sum-exp computes both. Where there is none, rows are taken block by block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Scores that the block by block path holds at a time (64 MiB in float32), over all samples and heads.
BLOCK_SCORES = 2**24
#: The CUDA kernel reads vectors of 16 bytes: head dimensions are padded with zeros, which change no score.
CUDA_ALIGNMENT = 8

aten = torch.ops.aten


def row_entropy(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Entropy in nats of ``softmax(scale * q k^T + mask)``, for each row.

    Shapes: ``q [B, H, N, D]``, ``k [B, H, M, D]``, of one dtype; ``mask`` None, or four-dimensional, of bool (False is
    out) or floating point (added), broadcasting to ``[B, H, N, M]``, its last dimension ``M``. -> ``[B, H, N]``,
    float64 for float64 and float32 for the rest. What a row without any key gets means nothing, and may be NaN.

    Error: that of the log-sum-exp, about one unit in the last place of the largest score; never below 0. float16 and
    bfloat16 are widened to float32, except on CUDA, where the kernel takes them and rounds ``A K`` to them once
    (bfloat16: up to 2e-3 nats a row, without bias, so 1e-5 in the mean over heads and rows).

    ======================================  ==============================  =====================================
    mask                                    CPU                             CUDA
    ======================================  ==============================  =====================================
    none, causal                            flash (any dtype)               efficient (float64: block by block)
    the same for all rows, bool or added    flash, as one more channel      efficient, as one more channel
    other bool                              flash                           block by block
    other added                             block by block                  block by block
    ======================================  ==============================  =====================================

    Other devices, and a scale that is not positive: block by block. Made of traceable operations only.
    """
    if _device(q) != "cuda" and q.dtype != torch.float64:
        q, k = q.float(), k.float()
    same_for_all_rows = mask is not None and mask.shape[-2] == 1
    if not _has_kernel(q, scale) or not (mask is None or same_for_all_rows or _takes_mask(q, mask)):
        return _by_blocks(q, k, mask, is_causal, scale)
    if mask is not None and same_for_all_rows:
        q, k, mask = _with_mask_as_channel(q, k, mask, scale)
    mean_key, lse = _attend(q, k, mask, is_causal, scale)
    mean_score = scale * (q.to(lse.dtype) * mean_key.to(lse.dtype)).sum(-1)
    return (lse - mean_score).clamp(min=0)  # a peaked row of large scores may cancel to less than nothing


def _device(q: Tensor) -> str:
    return q.device.type


def _has_kernel(q: Tensor, scale: float) -> bool:
    # The kernels look for the largest score before they scale.
    return scale > 0 and (_device(q) == "cpu" or (_device(q) == "cuda" and q.dtype != torch.float64))


def _takes_mask(q: Tensor, mask: Tensor) -> bool:
    # What is added per row and key would need its own mean: E_i[b_i] is no product with the values.
    return _device(q) == "cpu" and mask.dtype == torch.bool


def _attend(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``A K [B, H, N, D]`` and the log-sum-exp ``[B, H, N]`` of an attention, by the kernel of the device."""
    if _device(q) == "cpu":
        q, k = _dense(q), _dense(k)
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, k, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out, lse
    padding = (0, -q.shape[-1] % CUDA_ALIGNMENT)
    padded, key = _dense(F.pad(q, padding)), _dense(F.pad(k, padding))
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention.default(
        padded, key, key, None, True, 0.0, is_causal, scale=scale
    )
    return out[..., : q.shape[-1]], lse[..., : q.shape[-2]]  # rows of the log-sum-exp come padded to 32


def _dense(x: Tensor) -> Tensor:
    """The kernels step through channels one by one, whatever the stride: the CPU's gives wrong numbers, no error."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_mask_as_channel(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor, None]:
    """``q . k + b / scale`` as a product of vectors one longer, so that the mean score contains the mask's part.

    A mask that is the same for all rows is a property of the keys. Its largest value is subtracted (no attention
    changes), and what is out gets a number that no score outweighs: an infinity times a weight of 0 would be NaN.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=wide).masked_fill(~mask, -torch.inf)
    else:
        bias = mask.to(wide)
        bias = bias - bias.amax(-1, keepdim=True)  # NaN where all is -inf: no key, so the row does not count
    channel = (bias / scale).clamp(min=torch.finfo(q.dtype).min / 4).to(q.dtype)
    channel = channel.transpose(-1, -2).expand(*k.shape[:-1], 1)
    return torch.cat((q, torch.ones_like(q[..., :1])), -1), torch.cat((k, channel), -1), None


def _by_blocks(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """As defined, ``-sum_j A_ij ln A_ij``, for a block of rows at a time."""
    q, k = (q, k) if q.dtype == torch.float64 else (q.float(), k.float())
    rows, keys = q.shape[-2], k.shape[-2]
    step = max(1, min(rows, BLOCK_SCORES // (q.shape[0] * q.shape[1] * keys)))
    entropies = []
    for start in range(0, rows, step):
        block = q[:, :, start : start + step]
        scores = scale * (block @ k.transpose(-1, -2))
        if is_causal:
            row = torch.arange(start, start + block.shape[-2], device=q.device)[:, None]
            scores = scores.masked_fill(torch.arange(keys, device=q.device) > row, -torch.inf)
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[:, :, start : start + step]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        entropies.append(torch.special.entr(scores.softmax(-1)).sum(-1))
    return torch.cat(entropies, -1)
