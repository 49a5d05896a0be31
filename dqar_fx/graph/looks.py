"""What the values between pieces will look like, before any piece has run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger(__name__)

#: A piece, and where its arguments and results are.
Placed = tuple[fx.GraphModule, Sequence[int], Sequence[int]]
#: By register: what makes a tensor that looks like the value.
Makers = dict[int, Callable[[], torch.Tensor]]


def intermediate_looks(pieces: Sequence[Placed], registers: Sequence[Any]) -> Iterator[Makers]:
    """For each piece in turn, what makes stand-ins for those of its arguments that other pieces compute.

    A stand-in has the shape, strides, dtype and device that the value has when the graphs run as they are, and no
    values. Ends early at a piece that cannot be run on fake tensors, or where anything is not on the CPU.

    Args:
        pieces: in the order in which they run.
        registers: what is there before they run.
    """
    made: dict[int, Any] = {}
    makers: Makers = {}
    fake = FakeTensorMode()
    for gm, arguments, results in pieces:
        yield {i: makers[i] for i in arguments if i in makers}
        try:
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), fake:
                found = gm.forward(*(made[i] if i in made else _fake(registers[i]) for i in arguments))
        except Exception as error:  # whatever operators raise that ask for values
            logger.info("compiled as they run, from here on: %s", str(error).split("\n", 1)[0])
            return
        for i, value in zip(results, found, strict=True):
            made[i] = value
            if type(value) in {int, float, bool, type(None)} or value.device.type != "cpu":
                return
            layout = tuple(value.shape), tuple(value.stride())
            makers[i] = partial(torch.empty_strided, *layout, dtype=value.dtype, device=value.device)


def _fake(value: Any) -> Any:
    """``value`` without its values, in the ambient fake mode.

    Raises:
        TypeError: it is a tensor of another class, or not on the CPU.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if type(value) not in {torch.Tensor, torch.nn.Parameter} or value.device.type != "cpu":
        raise TypeError(f"a {type(value).__name__} on {value.device}")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
