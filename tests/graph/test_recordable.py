"""What a recording would get wrong is told from the captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqar_fx.graph.recordable import why_not_recordable


class State(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def reason(function: Callable[..., Any], device: str = "cpu", x: Tensor | None = None) -> str:
    """Of ``function(module, x)``, as Dynamo captures it; "meta" stands for a device beside the host."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(why_not_recordable(gm, device))
        return gm.forward

    torch._dynamo.reset()
    model = State(function).to("meta" if device == "meta" else "cpu")
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(model, backend=backend)(torch.ones(3, device=device) if x is None else x)
    assert len(found) == 1
    return found[0]


def writes_state(module: Any, x: Tensor) -> Tensor:
    module.seen.add_(x)
    return x + module.seen


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.softmax(x * 2, -1),
        lambda m, x: F.dropout(x, 0.5, training=False) + 1,
        lambda m, x: F.scaled_dot_product_attention(x[None, None, None], x[None, None, None], x[None, None, None]),
        lambda m, x: (x + 1, x.shape[0]),
        lambda m, x: torch.zeros_like(x).copy_(x),
        writes_state,
    ],
)
def test_what_follows_from_the_graph_alone_is_recorded(function: Callable[..., Any]) -> None:
    assert reason(function) == ""
    assert reason(function, "meta") == ""


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    return y, y[1:]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x + torch.rand(3), "rand is random"),
        (lambda m, x: x + torch.randn_like(x), "randn_like is random"),
        (lambda m, x: x + torch.empty_like(x).normal_(), "normal_ is random"),
        (lambda m, x: F.rrelu(x + 1, training=True), "rrelu is random"),
        (lambda m, x: x[x > 0].sum(), "known only when it runs"),
        (lambda m, x: x.mul_(2), "it writes into L['x']"),
        (lambda m, x: x[1:], "it returns getitem, which shares its memory with L['x']"),
        (lambda m, x: both(x), "which shares its memory with"),
    ],
)
def test_what_does_not_is_refused(function: Callable[..., Any], expected: str) -> None:
    assert expected in reason(function)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x + torch.arange(3).to("meta"), "arange is on the host"),
        (lambda m, x: x * torch.ones(()), "ones is on the host"),
    ],
)
def test_the_host_takes_part_in_nothing(function: Callable[..., Any], expected: str) -> None:
    assert reason(function, "meta") == expected


def test_an_input_on_the_host_is_refused_by_name() -> None:
    assert reason(lambda m, x: m.seen * x, "meta", torch.ones(())) == "L['x'] is on the host"


def test_a_choice_on_the_host_is_refused() -> None:
    def choose(module: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    assert reason(choose) == "cond may choose on the host what runs"
