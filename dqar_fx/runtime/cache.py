"""What is stored: static buffers, and for each site the step its value comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dqar_fx.graph.specialise import ExitLayout
from dqar_fx.quantize import scale_shape

#: Step of a site that holds no value.
EMPTY = -1


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """Shape, strides, device and layout of one exit, sizes resolved: all that is needed to allocate its buffers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    layout: ExitLayout

    def allocate(self) -> tuple[torch.Tensor, ...]:
        """New buffers: ``(values,)``, or ``(int8 values [shape], float32 scales)``.

        The strides of the exit are kept, so that a value read back is laid out like a fresh one. Never inference
        tensors: one and the same buffer may be written inside and outside of ``torch.inference_mode``.
        """
        with torch.inference_mode(False), torch.no_grad():
            dtype = torch.int8 if self.layout.granularity else self.layout.dtype
            values = torch.empty_strided(self.shape, self.stride, dtype=dtype, device=self.device)
            if not self.layout.granularity:
                return (values,)
            shape = scale_shape(self.shape, self.layout.granularity, self.layout.num_heads)
            return values, torch.empty(shape, dtype=torch.float32, device=self.device)


@dataclass(slots=True)
class Store:
    """The stored values of one captured graph, at given sizes, for one branch of one generation.

    Buffers are allocated at the first store and keep their addresses from then on; ``clear`` forgets the values and
    keeps the buffers, dropping the object frees them.
    """

    specs: Sequence[Sequence[ExitSpec]]  # [site][exit]
    buffers: list[list[tuple[torch.Tensor, ...]] | None] = field(init=False)
    step: list[int] = field(init=False)  # [site]: the step whose value is stored, EMPTY if none

    def __post_init__(self) -> None:
        self.buffers = [None] * len(self.specs)
        self.step = [EMPTY] * len(self.specs)

    def of(self, site: int) -> list[tuple[torch.Tensor, ...]]:
        """The buffers of a site, ``[exit][part]``, allocated if need be."""
        buffers = self.buffers[site]
        if buffers is None:
            buffers = self.buffers[site] = [spec.allocate() for spec in self.specs[site]]
        return buffers

    def clear(self) -> None:
        """Forget every value; the buffers stay."""
        self.step = [EMPTY] * len(self.specs)

    @property
    def is_empty(self) -> bool:
        """True if no site has a value, though buffers may be allocated."""
        return all(step == EMPTY for step in self.step)

    def site_bytes(self, site: int) -> int:
        """Bytes allocated for one site."""
        return sum(t.numel() * t.element_size() for parts in self.buffers[site] or [] for t in parts)

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(self.site_bytes(site) for site in range(len(self.specs)))
