"""What a forward returns: anything, as the eager model returns it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqar_fx
from dqar_fx import Schedule
from tests.families import NATIVE


class Custom:
    """No tensor, tuple, dict or diffusers output."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample
        self.parts = [sample + 1, {"half": sample / 2}]

    @property
    def value(self) -> Tensor:
        return self.sample


class Slotted:
    __slots__ = ("sample",)

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class Remembering:
    """What comes back was made long before the call."""

    def __init__(self) -> None:
        self.sample = torch.zeros(())

    def take(self, sample: Tensor) -> Remembering:
        self.sample = sample
        return self


@dataclasses.dataclass
class Data:
    sample: Tensor
    note: str | None = None


class Pair(NamedTuple):
    first: Tensor
    second: None


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda y: [y, None, [y * 2]],
    "dict": lambda y: {"sample": y, "none": None, "number": 3, "deep": {"tuple": (y + 1,)}},
    "ordered dict": lambda y: OrderedDict(sample=y, none=None),
    "dataclass": Data,
    "named tuple": lambda y: Pair(y, None),
    "none and text": lambda y: (None, y, "text", 1.5, True),
    "nothing": lambda y: None,
    "the same tensor twice": lambda y: (y, y),
    "custom class": Custom,
    "class with slots": Slotted,
    "an object that lives on": Remembering().take,
    "numpy array": lambda y: y.numpy(),
    "a number": lambda y: (y, y.sum().item()),
    "iterator": lambda y: iter((y, y + 1)),
}


class Model(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.wrap = wrap

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q * timestep, q).transpose(1, 2).flatten(2)
        return self.wrap(x + self.out(y))


def plain(value: Any) -> Any:
    """A value as nested built-ins, its type's name in front, tensors as bytes: equal if and only if the value is."""
    if isinstance(value, (Tensor, np.ndarray)):
        return type(value).__name__, np.asarray(value).tobytes(), tuple(value.shape)
    if isinstance(value, dict):
        return type(value).__name__, {k: plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "__dict__") or (hasattr(value, "__slots__") and not isinstance(value, (tuple, list))):
        names = list(vars(value)) if hasattr(value, "__dict__") else list(value.__slots__)
        return type(value).__name__, {name: plain(getattr(value, name)) for name in names}
    return type(value).__name__.removeprefix("list_").removeprefix("tuple_"), [plain(v) for v in value]


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_forward_may_return_anything(wrap: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = Model(wrap).eval()
    x = torch.randn(1, 6, 8)
    with torch.no_grad():
        expected = plain(model(x, torch.tensor(3.0)))
        dqar_fx.optimize(model, Schedule.always(3), cache=NATIVE, backend="eager")
        for time in (3.0, 2.0, 1.0):  # the last two read what the first stored: equal to it, since x is
            assert plain(model(x, torch.tensor(time))) == expected
    assert dqar_fx.runtime(model).stats.reused == 2
