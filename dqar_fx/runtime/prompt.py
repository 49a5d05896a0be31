"""How many tokens the prompt has: read off the mask of the text encoder, without waiting for the device."""

from __future__ import annotations

import torch

from dqar_fx.runtime.conditioning import Inputs
from dqar_fx.runtime.history import LAG, Arrival

_TEXT = ("encoder", "prompt", "text")


class Prompt:
    """The prompt of one generation.

    Args:
        inputs: the conditioning of its first call.
        step: that call's.
    """

    def __init__(self, inputs: Inputs, step: int) -> None:
        masks = [
            held.tensor
            for name, held in inputs.items()
            if "mask" in name and any(word in name for word in _TEXT) and held.tensor.ndim == 2
        ]
        self._from = step + LAG
        self._arrival = Arrival(torch.stack([_tokens(mask) for mask in masks]).amax()) if masks else None
        self._length: int | None = None

    def length(self, step: int) -> int | None:
        """Tokens of the longest prompt of the batch at ``step``; None without a mask.

        1 until it has arrived: with the shortest prompt there is, a limit that grows with its length blocks most.
        """
        if self._arrival is not None and step >= self._from:
            self._length, self._arrival = int(self._arrival.get()), None
        return 1 if self._arrival is not None else self._length


def _tokens(mask: torch.Tensor) -> torch.Tensor:
    """Of a mask ``[B, N]``, how many of a sample's tokens take part, at most: int64, on the mask's device.

    A mask of 1 and 0, or one that is added: 0 and a large negative number.
    """
    values = mask.float()
    added = values.amin() < 0
    return torch.where(added, values > values.amin() / 2, values > 0.5).sum(-1).amax()
