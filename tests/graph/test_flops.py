"""The count of FLOP: exact on graphs that can be counted by hand, and equal to DQAR's tables on its models."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from dqar_fx.example_inputs import example_inputs
from dqar_fx.graph.capture import module_stack, readable
from dqar_fx.graph.flops import Work, node_flops, site_savings, speedup_bound
from dqar_fx.graph.inspect import capture_graphs
from dqar_fx.graph.sites import find_sites
from tests.graph.conftest import capture_call


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    """Two blocks of width 16 on ``hidden_states [2, 8, 16]``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_states = hidden_states * 2
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


LINEAR = 2 * 2 * 8 * 16 * 16  # of one 16 x 16 linear layer on 2 x 8 tokens
PRODUCTS = 2 * 2 * 2 * 8 * 8 * 16  # of the two products of an attention of 8 tokens


def captured(kind: Callable[..., nn.Module], config: Mapping[str, Any], **sizes: int) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = kind(**config).eval().requires_grad_(False)
    (gm,) = capture_graphs(model, example_inputs(model, **sizes)).graphs
    return gm


def work_of(kind: Callable[..., nn.Module], config: Mapping[str, Any], **sizes: int) -> Work:
    gm = captured(kind, config, **sizes)
    return Work([gm], [find_sites(gm)])


def test_every_node_is_counted_by_its_shapes() -> None:
    (gm,) = capture_graphs(Model(), {"hidden_states": torch.randn(2, 8, 16)}).graphs
    counts = node_flops(gm)
    assert sorted(v for v in counts.values() if v) == sorted(2 * [PRODUCTS, 3 * LINEAR, LINEAR, LINEAR])
    assert not torch.is_autocast_enabled("cpu")  # the graph enters autocast; counting must not


def test_what_a_site_saves_is_its_module_and_nothing_else() -> None:
    (gm,) = capture_graphs(Model(), {"hidden_states": torch.randn(2, 8, 16)}).graphs
    text = readable(gm)
    work = Work([gm], [find_sites(gm)])
    assert work.total == 2 * (PRODUCTS + 5 * LINEAR)
    assert work.site_savings() == site_savings(gm, find_sites(gm)) == 2 * [PRODUCTS + 4 * LINEAR]
    assert work.of([False, True]) == work.total - (PRODUCTS + 4 * LINEAR)
    assert work.of([True, True]) == 2 * LINEAR == work.total - work.saved_together()
    assert work.uncounted == ()
    assert readable(gm) == text  # the input is untouched
    assert not any("dqar_flops" in node.meta for node in gm.graph.nodes)


class FlexAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(flex_attention(q, k, v, score_mod=lambda s, *_: s * 2).transpose(1, 2).flatten(-2))


class WrittenOutAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class MultiheadAttention(nn.MultiheadAttention):
    def __init__(self, width: int) -> None:
        super().__init__(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("kind", [FlexAttention, WrittenOutAttention, MultiheadAttention])
def test_other_forms_of_an_attention_cost_the_same(kind: Callable[[int], nn.Module]) -> None:
    model = Model()
    for block in model.blocks:
        block.attn = kind(16)
    gm, _ = capture_call(model.eval(), torch.randn(2, 8, 16))
    work = Work([gm], [find_sites(gm)])
    assert work.total == 2 * (PRODUCTS + 5 * LINEAR)
    assert work.site_savings() == 2 * [PRODUCTS + 4 * LINEAR]
    assert work.uncounted == ()


class Packed(Model):
    """On those tokens that a mask leaves."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            hidden_states = torch.cat([hidden_states[:, :4], hidden_states[:, 4:][:, mask]], 1)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_a_size_that_depends_on_values_counts_as_the_largest_it_can_be() -> None:
    model, x = Packed().eval(), torch.randn(2, 8, 16)
    (plain,) = capture_graphs(model, {"hidden_states": x}).graphs
    (packed,) = capture_graphs(model, {"hidden_states": x, "mask": torch.tensor([True, False, True, False])}).graphs
    one, other = Work([plain], [find_sites(plain)]), Work([packed], [find_sites(packed)])
    assert one.total == other.total == 2 * (PRODUCTS + 5 * LINEAR)
    assert one.site_savings() == other.site_savings() == 2 * [PRODUCTS + 4 * LINEAR]
    assert other.uncounted == ()


def test_a_node_without_an_example_is_told_as_uncounted() -> None:
    (gm,) = capture_graphs(Model(), {"hidden_states": torch.randn(2, 8, 16)}).graphs
    first = next(n for n in gm.graph.nodes if n.target == "chunk")
    del first.meta["example_value"]
    counts = node_flops(gm)
    assert first.name in counts
    assert sum(counts.values()) == 2 * (PRODUCTS + 5 * LINEAR)
    assert not {user.name for user in first.users} - set(counts)  # an item of a tuple costs nothing


def test_cache_bytes_are_those_of_values_and_scales() -> None:
    (gm,) = capture_graphs(Model(), {"hidden_states": torch.randn(2, 8, 16)}).graphs
    work = Work([gm], [find_sites(gm)])
    assert work.site_bytes() == 2 * [2 * 8 * 16 + 2 * 8 * 4]  # int8, and one float32 scale for each token
    assert work.native_bytes() == 2 * [2 * 8 * 16 * 4]


def test_the_total_is_what_torch_counts_on_the_eager_model() -> None:
    config = {"num_layers": 2, "sample_size": 16, "dual_attention_layers": (0,), "joint_attention_dim": 64}
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config).eval().requires_grad_(False)
    inputs = example_inputs(model, text_tokens=7)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert work_of(SD3Transformer2DModel, config, text_tokens=7).total == counter.get_total_flops()


def test_what_several_sites_share_vanishes_when_all_of_them_reuse() -> None:
    config = {"num_layers": 2, "caption_channels": 64, "sample_size": 16, "use_additional_conditions": False}
    work = work_of(PixArtTransformer2DModel, config)
    # The projection of the caption feeds every cross-attention and nothing else.
    projection = 2 * 512 * (64 * 1152 + 1152 * 1152)
    assert work.saved_together() == sum(work.site_savings()) + projection


# DQAR's FLOP tables, per batch row, with a multiply-add as two. All blocks of a list cost the same: one tells of all.
DIT = {"num_layers": 1, "out_channels": 8}
PIXART = {"num_layers": 2, "caption_channels": 4096, "sample_size": 128, "use_additional_conditions": False}
FLUX = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}


def full_size(
    kind: Callable[..., nn.Module], config: Mapping[str, Any], blocks: Mapping[str, int], **sizes: int
) -> tuple[float, dict[str, float]]:
    """GFLOP of a model with so many blocks in each list, and the share that each site saves in all of its list."""
    gm = captured(kind, config, **sizes)
    counts = node_flops(gm)
    total = sum(counts.values())
    for name, count in blocks.items():
        inside = [n for n in gm.graph.nodes if any(call.path == f"{name}.0" for call in module_stack(n))]
        present = len(
            {c.path for n in gm.graph.nodes for c in module_stack(n) if re.fullmatch(rf"{name}\.\d+", c.path)}
        )
        total += (count - present) * sum(counts.get(n.name, 0) for n in inside)
    regions = find_sites(gm)
    shares = {}
    for region, saved in zip(regions, site_savings(gm, regions), strict=True):
        name, index, attention = region.site.path.rsplit(".", 2)
        if index == "0":
            shares[f"{name}.{attention}"] = blocks[name] * saved / total
    return total / 1e9, shares


@pytest.mark.parametrize(("sample_size", "gflop", "share"), [(32, 237.33, 0.3563), (64, 1049.2, 0.4191)])
def test_dit_xl_2(sample_size: int, gflop: float, share: float) -> None:
    total, shares = full_size(DiTTransformer2DModel, {**DIT, "sample_size": sample_size}, {"transformer_blocks": 28})
    assert total == pytest.approx(gflop, rel=0.01)
    assert shares == {"transformer_blocks.attn1": pytest.approx(share, rel=0.01)}


def test_pixart_sigma_1024() -> None:
    total, shares = full_size(PixArtTransformer2DModel, PIXART, {"transformer_blocks": 28}, text_tokens=300)
    assert total == pytest.approx(6633.6, rel=0.01)
    assert shares["transformer_blocks.attn1"] == pytest.approx(0.5099, rel=0.01)
    assert sum(shares.values()) == pytest.approx(0.6323, rel=0.01)


def test_flux_dev_1024() -> None:
    blocks = {"transformer_blocks": 19, "single_transformer_blocks": 38}
    total, shares = full_size(FluxTransformer2DModel, FLUX, blocks, height=64, width=64, text_tokens=512)
    assert total == pytest.approx(74_385, rel=0.01)
    assert sum(shares.values()) == pytest.approx(0.4221, rel=0.01)


# DQAR's table of bounds: the share of attentions that reuse, and the bound for DiT-256, DiT-512, PixArt and Flux.
@pytest.mark.parametrize(
    ("ratio", "bounds"),
    [
        (0.088, (1.032, 1.038, 1.047, 1.039)),
        (0.387, (1.160, 1.194, 1.246, 1.195)),
        (0.98, (1.536, 1.697, 1.999, 1.705)),
        (1.0, (1.553, 1.721, 2.040, 1.730)),
    ],
)
def test_bounds_of_the_table(ratio: float, bounds: tuple[float, ...]) -> None:
    for share, bound in zip((0.3563, 0.4191, 0.5099, 0.4221), bounds, strict=True):
        saved = [round(share * 1e9)] * round(1000 * ratio)
        saved += [0] * (1000 - len(saved))
        assert speedup_bound(10**9, saved) == pytest.approx(bound, abs=0.0015)


def test_bounds_at_the_ends() -> None:
    assert speedup_bound(100, [0, 0, 0]) == 1.0
    assert speedup_bound(100, [0, 50]) == pytest.approx(200 / 150)
    assert speedup_bound(100, [100, 100]) == float("inf")
    assert speedup_bound(0, [0]) == float("inf")
