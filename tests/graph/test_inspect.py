"""Which attentions a model calls eagerly, whatever their form, against those that its graphs hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from dqar_fx.graph.attentions import is_attention
from dqar_fx.graph.inspect import capture_graphs
from tests.graph.conftest import WIDTH, Attention, join_heads, split_heads, tokens


class Flex(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(join_heads(flex_attention(*map(split_heads, self.qkv(x).chunk(3, -1)))))


class MultiHead(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Stack(nn.Module):
    """Two attentions in the graph, and one that Dynamo may not see."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers[0](x)
        x = x + self.layers[1](x)
        return x + hidden(self.layers[2], x)


@torch._dynamo.disable
def hidden(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


@pytest.mark.parametrize("make", [Attention, Flex, MultiHead])
def test_attentions_of_every_form_are_counted_in_the_model_and_in_its_graphs(make: Callable[[], nn.Module]) -> None:
    capture = capture_graphs(Stack(make).eval(), {"x": tokens()})
    assert capture.attentions == 3
    assert sum(is_attention(node) for gm in capture.graphs for node in gm.graph.nodes) == 2
    assert len(capture.breaks) == 1
