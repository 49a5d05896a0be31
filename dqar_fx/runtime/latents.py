"""The norm of the model's latents for a learned policy, read without waiting for the device."""

from __future__ import annotations

import math
from collections import deque

import torch

from dqar_fx import metrics
from dqar_fx.runtime.history import LAG, Arrival


class LatentNorms:
    """``||x_t||_2`` of the latents of each step of one generation, mean over samples.

    As everything that is measured, the norm at step ``t`` decides from step ``t + LAG`` on.
    """

    def __init__(self) -> None:
        self._last = -1
        self._norm = math.nan
        self._arriving: deque[tuple[int, Arrival]] = deque()

    def at(self, step: int, latents: object) -> float:
        """What is known at ``step``, whose ``latents`` are sent for; NaN before anything has arrived.

        ``latents`` other than a floating point tensor ``[B, ...]`` have no norm that could be known.
        """
        while self._arriving and self._arriving[0][0] + LAG <= step:
            (self._norm,) = self._arriving.popleft()[1].get().tolist()
        if step != self._last and isinstance(latents, torch.Tensor) and latents.ndim and latents.is_floating_point():
            self._last = step  # the branches of a step share their latents
            with torch.no_grad():
                self._arriving.append((step, Arrival(metrics.latent_norm(latents.detach()).mean(0, keepdim=True))))
        return self._norm
