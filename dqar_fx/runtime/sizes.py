"""Sizes in place of the symbols that a graph was captured with: of what is stored, and of what a call has found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from dqar_fx.errors import CacheError
from dqar_fx.graph.effects import tensors_of
from dqar_fx.graph.sites import Site
from dqar_fx.graph.specialise import ExitLayout
from dqar_fx.runtime.cache import ExitSpec, is_apart


def exit_spec(
    value: torch.Tensor,
    layout: ExitLayout,
    sizes: dict[str, int],
    on_host: bool,
    factors: torch.Tensor | None = None,
    site: Site | None = None,
) -> ExitSpec:
    """What to allocate for an exit that was captured as ``value``, where the sizes of the inputs are ``sizes``.

    ``on_host``: in host memory, if the exit is not there anyway. ``factors``: its calibrated balance.
    ``site``: whose it is.
    """
    on_host = on_host and is_apart(value.device)
    if layout.late_size:
        return ExitSpec((0,) * value.ndim, (1,) * value.ndim, value.device, layout, on_host)  # see Program.keep
    shape = tuple(_resolve(s, sizes) for s in value.shape)
    stride = tuple(_resolve(s, sizes) for s in value.stride())
    stride = stride if _is_dense(shape, stride) else _contiguous(shape)
    return ExitSpec(shape, stride, value.device, layout, on_host, factors, site is not None and site.lossless)


def symbols_of(nodes: Iterable[fx.Node]) -> set[str]:
    """Names of the symbols in the shapes and strides of all values; those that only say where a view begins are not."""
    found: set[str] = set()
    for node in nodes:
        for tensor in tensors_of(node.meta.get("example_value")):
            for size in (*tensor.shape, *tensor.stride()):
                if isinstance(size, torch.SymInt):
                    found.update(map(str, size.node.expr.free_symbols))
    return found


def _resolve(size: int | torch.SymInt, sizes: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True if the strides describe a permutation of contiguous memory: no gaps, no overlap."""
    expected = 1
    for step, size in sorted((st, sz) for sz, st in zip(shape, stride, strict=True) if sz != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        stride[i] = stride[i + 1] * max(shape[i + 1], 1)
    return tuple(stride)


def check_sizes(symbolic: Sequence[tuple[int, Any]], given: Sequence[Any]) -> None:
    """Refuse stored values whose sizes are not those that this call has found.

    Raises:
        CacheError: the same symbol stands for two sizes.
    """
    known: dict[str, int] = {}
    for position, example in symbolic:
        if isinstance(example, torch.Tensor):
            for symbol, size in zip(example.shape, given[position].shape, strict=True):
                if known.setdefault(str(symbol), size) != size:
                    raise CacheError(
                        f"a stored attention has size {known[str(symbol)]} where this call has {size} (of "
                        f"{list(given[position].shape)}): a mask has changed in the middle of a generation. Call "
                        f"runtime.reset() before another prompt, or enter runtime.generation()."
                    )
