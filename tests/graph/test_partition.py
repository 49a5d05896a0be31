"""Pieces between repeated blocks: where the graph is cut, where it must not be, and which pieces are equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from dqar_fx.graph.capture import lift_constants, readable
from dqar_fx.graph.guard import guard_sites
from dqar_fx.graph.partition import Piece, count_guards, partition, structure
from dqar_fx.graph.sites import find_sites
from tests.graph.conftest import (
    MODELS,
    WIDTH,
    Attention,
    Block,
    Transformer,
    attend,
    capture_call,
    captured_model,
    equal,
    tokens,
    traced,
)


def pieces_of(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> list[Piece]:
    """The pieces of a captured graph, after checking that they lose nothing and compute the same."""
    regions = [r for r in find_sites(gm) if not r.site.reason]
    whole, constants = lift_constants(guard_sites(gm, regions))
    text = readable(whole)
    pieces = partition(whole, regions)
    assert readable(whole) == text  # the input is untouched
    assert count_guards(pieces) == len(regions)
    assert [site for piece in pieces for site in piece.sites] == list(range(len(regions)))

    values = dict(zip((n.name for n in whole.graph.nodes if n.op == "placeholder"), (*inputs, *constants), strict=True))
    for piece in pieces:
        results = piece.gm(*(values[name] for name in piece.inputs))
        values |= zip(piece.outputs, results, strict=True)
        assert all(isinstance(r, (Tensor, int, float)) for r in results)  # no tuple crosses a cut
    result = next(n for n in whole.graph.nodes if n.op == "output").args[0]
    assert equal(fx.map_arg(result, lambda n: values[n.name]), gm(*inputs))
    return pieces


def pieces(model: nn.Module, *inputs: Any) -> list[Piece]:
    return pieces_of(*capture_call(model, *(inputs or (tokens(), torch.tensor(1.0)))))


def labels(parts: list[Piece]) -> list[str]:
    return [p.label for p in parts]


def test_a_transformer_is_cut_between_its_blocks() -> None:
    parts = pieces(Transformer())
    assert labels(parts) == ["prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"]
    assert [p.sites for p in parts] == [(), (0,), (1,), (2,), ()]
    assert parts[1].key == parts[2].key == parts[3].key  # so they share one compilation
    assert len({p.key for p in parts}) == 3
    assert parts[1].inputs != parts[2].inputs  # parameters are arguments


@pytest.mark.parametrize("name", MODELS)
def test_the_pieces_of_diffusers_models_compute_the_same(name: str) -> None:
    parts = pieces_of(*captured_model(name))
    assert [labels(parts)[0], labels(parts)[-1]] == ["prologue", "epilogue"]
    blocks = parts[1:-1]
    assert all(p.sites for p in blocks)
    assert len(set(labels(blocks))) == len(blocks)  # each block is one piece
    # The last block of SD3 drops the text, and so does what follows the last single block of Flux.
    kinds = {"dit": 1, "pixart": 1, "sd3": 2, "flux": 3, "wan": 1}
    assert len({p.key for p in blocks}) == kinds[name]


def test_the_conditioning_of_block_0_may_be_used_again_at_the_end() -> None:
    """DiT: the last layer calls ``transformer_blocks[0].norm1.emb`` once more."""

    class Dit(Transformer):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            c = timestep.sin() * torch.ones(2, WIDTH)
            return super().forward(x, timestep) * self.blocks[0].modulation(c).mean()

    parts = pieces(Dit())
    assert labels(parts) == ["prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"]
    assert parts[1].key == parts[2].key


@pytest.mark.parametrize("value", [1.0, -1, 2])
def test_a_block_with_another_constant_is_another_piece(value: object) -> None:
    class Scaled(Block):
        factor: object = 1

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return torch.add(super().forward(x, c), x, alpha=self.factor)  # type: ignore[call-overload]

    odd = Scaled()
    odd.factor = value
    parts = pieces(Transformer(Scaled(), odd, Scaled()))
    assert parts[1].key == parts[3].key
    assert parts[1].key != parts[2].key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 1, lambda x: x * 1.0),
        (lambda x: x * 1, lambda x: x * True),
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: x[0:1], lambda x: x[0:2]),
        (lambda x: x.view(4), lambda x: x.view((4,))),
        (lambda x: x.sum(dim=0), lambda x: x.sum(dim=1)),
        (lambda x: x.to(torch.float16), lambda x: x.to(torch.bfloat16)),
        (lambda x: (x, x + 1), lambda x: (x + 1, x)),
        (lambda x: x.sin() - x.cos(), lambda x: -(x.cos() - x.sin())),
    ],
)
def test_the_picture_of_a_graph_tells_what_it_computes(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    pictures = [structure(traced(f, torch.ones(2, 2))) for f in (one, one, other)]
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
    assert hash(pictures[0]) == hash(pictures[1])


class Flex(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(flex_attention(q, k, v, score_mod=self.score).transpose(1, 2).flatten(2))

    @staticmethod
    def score(score: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + (i - j)


class OtherFlex(Flex):
    @staticmethod
    def score(score: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - (i - j)


def test_equal_bodies_of_higher_order_operators_make_equal_pieces() -> None:
    gm, _ = capture_call(Transformer(Block(Flex), Block(Flex), Block(OtherFlex)), tokens(), torch.tensor(1.0))
    regions = find_sites(gm)
    parts = partition(lift_constants(guard_sites(gm, regions))[0], regions)
    assert labels(parts) == ["prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"]
    assert parts[1].key == parts[2].key
    assert parts[1].key != parts[3].key


def test_graphs_that_differ_in_what_shares_memory_are_not_equal() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.contiguous()  # a copy, or x itself
        y.add_(1)
        return x * 2

    x = torch.ones(2, 3)
    assert structure(traced(function, x)) == structure(traced(function, torch.zeros(2, 3)))
    assert structure(traced(function, x)) != structure(traced(function, torch.ones(3, 2).t()))


# -- where it must not be cut ---------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Attentions in a list; subclasses say what happens around them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)


class InPlaceStream(Blocks):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * timestep
        for block in self.blocks:
            x += block(x)
        return self.head(x)


class OneAutocast(Blocks):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in self.blocks:
                x = x + block(x)
        return self.head(x)


class AutocastEach(Blocks):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = block(x)
            x = x + y
        return self.head(x)


class KernelEach(Blocks):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            with sdpa_kernel(SDPBackend.MATH):
                y = block(x)
            x = x + y
        return self.head(x)


class CarriesTuple(Blocks):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        parts = x.chunk(2, -1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) + torch.cat((parts[1], parts[0]), -1)


class WritesInput(Blocks):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = x.clone()
        for block in self.blocks:
            y = y + block(y)
        y[:, 0] = 0.0
        return self.head(y)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (InPlaceStream(), ["prologue"]),  # the stream is one storage from the beginning to the head
        (OneAutocast(), ["blocks.0"]),
        (AutocastEach(), ["blocks.0", "blocks.1", "blocks.2", "epilogue"]),
        (KernelEach(), ["blocks.0", "blocks.1", "blocks.2", "epilogue"]),
        (CarriesTuple(), ["prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"]),
        (WritesInput(), ["prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_what_belongs_together_is_not_cut(model: nn.Module, expected: list[str]) -> None:
    assert labels(pieces(model)) == expected


# -- other shapes of models -----------------------------------------------------------------------------------------


class NoList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        c = timestep * torch.ones(2, WIDTH)
        return self.second(self.first(x, c), c)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Transformer(Block(), Block()) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x, timestep)
        return x


class ListsOfParts(nn.Module):
    """No blocks: a list of attentions and a list of feed-forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.attns = nn.ModuleList(Attention() for _ in range(3))
        self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for attn, mlp in zip(self.attns, self.mlps, strict=True):
            x = x + attn(x) * timestep
            x = x + mlp(x)
        return x


class ListInside(nn.Module):
    """A list inside the attention (diffusers' ``to_out.0``) is no block."""

    class Attn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
            self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])

        def forward(self, x: Tensor) -> Tensor:
            x = attend(*self.to_qkv(x).chunk(3, -1))
            for module in self.to_out:
                x = module(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block(ListInside.Attn) for _ in range(2)))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, torch.ones(2, WIDTH))
        return x * timestep


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (NoList(), ["prologue"]),
        (Stages(), ["prologue", *(f"stages.{i}.blocks.{j}" for i in range(2) for j in range(2)), "epilogue"]),
        (ListsOfParts(), ["attns.0", "attns.1", "attns.2", "epilogue"]),
        (ListInside(), ["prologue", "layers.0", "layers.1", "epilogue"]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_models_of_other_shapes(model: nn.Module, expected: list[str]) -> None:
    assert labels(pieces(model)) == expected


def test_a_model_that_is_nothing_but_an_attention_is_one_piece() -> None:
    def model(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    gm, inputs = capture_call(model, torch.randn(1, 2, 3, 4))
    (piece,) = pieces_of(gm, inputs)
    assert piece.sites == (0,)
