"""What a compute step may measure of an attention, as nodes of its graph: nothing leaves the device while it runs.

A *row* is what is measured of one site: ``[entropy, largest of a sample, change, largest of a sample]``, float32, NaN
where it was not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from dqar_fx.metrics.entropy import entropy_in_graph

#: How many numbers a row holds.
ROW = 4
#: How many there are of how far a site is from another branch of guidance: ``[difference, largest of a sample]``.
DIFFERENCE_ROW = 2
_TINY = 1e-30


def can_tell_entropy(node: fx.Node) -> bool:
    """True for an attention whose entropy can be computed from its arguments."""
    return node.op == "call_function" and node.target is scaled_dot_product_attention


def put_entropy(graph: fx.Graph, attention: fx.Node, normalize: str, rows: str) -> fx.Node:
    """Behind a ``scaled_dot_product_attention``, the entropy of what it attends to: ``[B]``.

    Before::  a = scaled_dot_product_attention(q, k, v, mask)
    After::   a = scaled_dot_product_attention(q, k, v, mask);  h = entropy_in_graph(q, k, mask)

    ``rows``: of how many queries, "" for all.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = {**dict(zip(names, attention.args, strict=False)), **attention.kwargs}
    kept = {name: given[name] for name in names if name in given and name not in ("value", "dropout_p")}
    with graph.inserting_after(attention):
        return graph.call_function(
            entropy_in_graph, (), {**kept, "normalize": normalize, "rows": int(rows) if rows else None}
        )


def entropy_of(entropies: Sequence[Tensor]) -> Tensor:
    """First half of a row, from the entropy ``[B]`` of each attention of the site: mean, and largest of a sample."""
    mean = torch.stack([e.float().mean() for e in entropies]).mean()
    return torch.stack((mean, torch.stack([e.float().amax() for e in entropies]).amax()))


def change_of(fresh: Sequence[Tensor], stored: Sequence[Tensor], apart: bool) -> Tensor:
    """Second half of a row: ``|fresh - stored| / |fresh|``, L2 over all exits, mean and largest of a sample.

    ``fresh`` and ``stored``: the exits as computed now and as they were stored before (or by another branch; that is a
    row of its own). ``apart``: their first dimension is that of the samples; otherwise the whole batch is one.
    """
    pairs = [(new.float(), old.float()) for new, old in zip(fresh, stored, strict=True)]
    difference = torch.stack([_square(new - old, apart) for new, old in pairs]).sum(0)
    size = torch.stack([_square(new, apart) for new, _ in pairs]).sum(0)
    change = (difference / size.clamp(min=_TINY)).sqrt()
    return torch.stack((change.mean(), change.amax()))


def _square(x: Tensor, apart: bool) -> Tensor:
    return x.square().sum(tuple(range(1, x.ndim))) if apart else x.square().sum().reshape(1)
