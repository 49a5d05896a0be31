"""Which attentions are found, who owns them, where their value leaves, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dqar_fx.graph.attentions import is_attention
from dqar_fx.graph.capture import module_stack, readable
from dqar_fx.graph.effects import target_name
from dqar_fx.graph.sites import Region, find_sites
from tests.graph.conftest import (
    WIDTH,
    Attention,
    Block,
    Transformer,
    attend,
    capture,
    captured_model,
    join_heads,
    split_heads,
    tokens,
)


def sites_of(model: nn.Module, *inputs: object, **kwargs: object) -> list[Region]:
    gm = capture(model, *(inputs or (tokens(),)), **kwargs)
    text = readable(gm)
    regions = find_sites(gm)
    assert readable(gm) == text  # it only looks
    for region in regions:
        nodes = {n.name: n for n in gm.graph.nodes}
        assert all(is_attention(nodes[name]) for name in region.attentions)
        assert region.site.exits == region.exits
    return regions


def only(regions: list[Region]) -> Region:
    (region,) = regions
    assert region.site.reason == ""
    return region


class Around(nn.Module):
    """A residual around one module."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = x + module(x)
        return x * 2


class Mixer(Attention):
    """An attention by another name: only what follows from the product leaves it."""


class Gated(Attention):
    """Its output is gated by its own input, so more than the product and parameters leaves it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(*self.qkv(x).chunk(3, -1)) * torch.sigmoid(x))


class GatedMixer(Gated):
    pass


class Core(nn.Module):
    """No projections."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


class WithCore(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.core = Core()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(*self.qkv(x).chunk(3, -1)))


class Straight(Attention):
    """The product stands in the block's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean(1, keepdim=True)
        return x + gate * self.out(attend(*self.qkv(x).chunk(3, -1)))


class SelfAttentionBlock(Straight):
    """Calls itself an attention, and is a block: what leaves it is the residual stream."""


class FusedResidualAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, x.mean(1, keepdim=True), self.out(attend(*self.qkv(x).chunk(3, -1))))


class InPlaceResidualAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        out = self.out(attend(*self.qkv(x).chunk(3, -1)))
        out += x.contiguous()
        return out


class PostNormAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class JointAttention(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image, text = super().forward(x).split([3, 2], dim=1)
        return image, text


class Joint(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        image, text = self.attn(x)
        return torch.cat([text, image * 2], 1) + x


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.out(attend(self.q(x), *self.kv(text).chunk(2, -1)))


class TwoProducts(Attention):
    """A text and a picture prompt, as in IP-Adapter."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(attend(q, k, v) + 0.5 * attend(q, k[:, :2], v[:, :2]))


class Nested(Attention):
    """An attention within an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.refine(x))


class RotaryCore(nn.Module):
    """Calls itself an attention, and has nothing but the table that it is handed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q * table, k * table, v)


class WithRotaryCore(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(WIDTH))
        self.core_attn = RotaryCore()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core_attn(*self.qkv(x).chunk(3, -1), self.table))


class WithBuffer(Attention):
    """Writes its result into memory that it made, and hands that out."""

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        result[:, 1:] = super().forward(x)[:, 1:]
        return result


@pytest.mark.parametrize(
    ("model", "path", "owner", "last"),
    [
        (Around(attn=Attention()), "attn", "Attention", "linear"),
        (Around(attn=Mixer()), "attn", "Mixer", "linear"),  # by the name of its path
        (Around(mix=Mixer()), "mix", "Mixer", "linear"),  # by dominance: nothing else gets past the product
        (Around(attn=GatedMixer()), "attn", "GatedMixer", "linear"),
        (Around(mix=GatedMixer()), "mix", "", "flatten"),  # a gate, and no name: only the product itself
        (Around(mix=WithCore()), "mix", "WithCore", "linear"),  # the core has no parameters: the module around it
        (Around(attn=WithRotaryCore()), "attn", "WithRotaryCore", "linear"),
        (Around(block=Straight()), "block", "", "linear"),  # with the out-projection, without gate and residual
        (Around(block=SelfAttentionBlock()), "block", "", "linear"),
        (Around(block=FusedResidualAttention()), "block", "", "linear"),
        (Around(block=InPlaceResidualAttention()), "block", "", "linear"),
        (Around(attn=PostNormAttention()), "attn", "PostNormAttention", "layer_norm"),
        (Around(attn=WithBuffer()), "attn", "WithBuffer", "zeros_like"),
        (Straight(), "", "", "linear"),  # no module at all but the model
    ],
    ids=lambda v: type(next(v.children())).__name__ if isinstance(v, Around) else None,
)
def test_who_owns_an_attention_and_where_its_value_leaves(model: nn.Module, path: str, owner: str, last: str) -> None:
    gm = capture(model, tokens())
    site = only(find_sites(gm)).site
    (leaving,) = [n for n in gm.graph.nodes if n.name in site.exits]
    assert (site.path, site.owner, target_name(leaving)) == (path, owner, last)
    assert (site.kind, site.heads) == ("self", 2)
    assert site.shapes == ((2, 5, WIDTH),)


def test_a_region_holds_all_that_is_skipped_and_nothing_behind_the_exit() -> None:
    gm = capture(Transformer(Block()), tokens(), torch.tensor(1.0))
    region = only(find_sites(gm))
    inside = [n for n in gm.graph.nodes if n.name in region.inside]
    assert {module_stack(n)[1].path for n in inside} == {"blocks.0.attn"}
    assert [target_name(n) for n in inside].count("linear") == 2
    (leaving,) = (n for n in inside if n.name in region.exits)
    assert {target_name(u) for u in leaving.users} == {"mul"}  # the gate


def test_sizes_do_not_hide_the_out_projection_where_shapes_are_dynamic() -> None:
    class Reshaping(Straight):
        def forward(self, x: Tensor) -> Tensor:
            b, n, d = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))

    gm = capture(Reshaping(), tokens(), dynamic=True)
    assert any(n.op == "placeholder" and isinstance(n.meta["example_value"], torch.SymInt) for n in gm.graph.nodes)
    site = only(find_sites(gm)).site
    assert site.exits == tuple(n.name for n in gm.graph.nodes if target_name(n) == "linear")[-1:]


def test_joint_attention_has_two_exits() -> None:
    site = only(sites_of(Joint(JointAttention()))).site
    assert site.kind == "joint"
    assert site.shapes == ((2, 3, WIDTH), (2, 2, WIDTH))


@pytest.mark.parametrize("method", ["chunk", "split", "unbind"])
def test_the_items_of_a_tuple_are_its_exits(method: str) -> None:
    class Tuples(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = super().forward(x)
            if method == "unbind":
                return y.unflatten(-1, (2, -1)).unbind(-1)[:2]
            return y.chunk(2, -1) if method == "chunk" else y.split(WIDTH // 2, -1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Tuples()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.attn(x)
            return a * 2 + b

    assert len(only(sites_of(Model())).exits) == 2


def test_the_kind_of_cross_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = CrossAttention()

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return x + self.attn(x, text)

    assert only(sites_of(Model(), tokens(), tokens(length=3))).site.kind == "cross"


def test_several_products_in_one_module_are_one_site() -> None:
    region = only(sites_of(Around(attn=TwoProducts())))
    assert len(region.attentions) == 2
    assert len(region.exits) == 1


def test_an_attention_within_an_attention_is_one_site_with_it() -> None:
    region = only(sites_of(Around(attn=Nested())))
    assert (region.site.path, region.site.owner, len(region.attentions)) == ("attn", "Nested", 2)


def test_a_shared_module_is_a_site_at_each_call() -> None:
    first, second = Block(), Block()
    second.attn = first.attn
    regions = sites_of(Transformer(first, second, first), tokens(), torch.tensor(1.0))
    assert [r.site.path for r in regions] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert not regions[0].inside & regions[1].inside
    assert not regions[0].inside & regions[2].inside


def test_sites_are_in_graph_order() -> None:
    model = nn.Sequential(*(Attention() for _ in range(11)))
    assert [r.site.path for r in sites_of(model)] == [f"{i}" for i in range(11)]


def test_a_model_without_attention_has_no_sites() -> None:
    assert sites_of(nn.Linear(WIDTH, WIDTH)) == []


def test_memory_that_is_written_into_is_no_constant() -> None:
    class Stream(Attention):
        def forward(self, x: Tensor) -> Tensor:
            stream = torch.empty(2, 5, WIDTH)  # made of nothing, and then the residual stream
            stream.copy_(x)
            return self.out(attend(*self.qkv(x).chunk(3, -1))) + stream

    gm = capture(Stream(), tokens())
    (leaving,) = [n for n in gm.graph.nodes if n.name in only(find_sites(gm)).exits]
    assert target_name(leaving) == "linear"


# -- refusals -------------------------------------------------------------------------------------------------------


class Keeps(Attention):
    """Keeps the keys of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.keys.copy_(x)
        return super().forward(x)


class WritesInput(Attention):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        x.view(-1)[0] = out[0, 0, 0]
        return out


class Indices(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(x)
        return out, out.argmax(-1, keepdim=True)


class Mean(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(x)
        return out, out.mean()


class Pair(nn.Module):
    """Uses both results of its attention."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        out, other = self.attn(x)
        return x + out * other


class OverlappingWrite(Pair):
    def forward(self, x: Tensor) -> Tensor:
        out, view = self.attn(x)
        out.add_(1)  # shows in the other one
        return x + view.view(x.shape)


class WithView(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(x)
        return out, out.view(2, -1)


class Discards(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.attn(x)
        return x * 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Around(attn=Keeps()), "copy_ writes in place into l_.*keys.*, which lives outside of the attention"),
        (Around(attn=WritesInput()), "setitem writes in place into .*, which lives outside of the attention"),
        (Pair(Indices()), r"its exit .* has dtype torch.int64; only floating point can be stored"),
        (Pair(Mean()), r"its exit .* has 0 dimension\(s\); at least 2 are needed"),
        (OverlappingWrite(WithView()), "add_ writes in place into the exit .*, which shares memory with another exit"),
        (Discards(attn=Attention()), "its value is never used"),
    ],
)
def test_what_cannot_be_skipped_is_refused_with_its_reason(model: nn.Module, reason: str) -> None:
    (region,) = sites_of(model)
    assert region.site.index == -1
    assert region.site.path == "attn"
    with pytest.raises(ValueError, match=f"^{reason}$"):
        raise ValueError(region.site.reason)


def test_a_reader_in_the_middle_of_the_attention_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    attention = graph.call_function(F.scaled_dot_product_attention, (x, x, x))
    early = graph.call_method("sin", (attention,))
    projected = graph.call_function(torch.mul, (attention, 2))
    graph.output((early, projected))
    for node in (x, attention, early, projected):
        node.meta["example_value"] = torch.randn(1, 2, 3, 4)
    for node in (attention, projected):
        node.meta["nn_module_stack"] = {"1": ("L['self'].attn", Attention)}
    weight = graph.placeholder("w")
    weight.meta = {"example_value": torch.ones(1), "dqar_constant": True}
    projected.args = (attention, weight)
    (region,) = find_sites(fx.GraphModule(nn.Module(), graph))
    assert region.site.reason == "sin reads the exit scaled_dot_product_attention before the attention is complete"


# -- diffusers ------------------------------------------------------------------------------------------------------

EXPECTED = {
    "dit": [("transformer_blocks.{}.attn1", "self", 1)] * 3,
    "pixart": [("transformer_blocks.{}.attn1", "self", 1), ("transformer_blocks.{}.attn2", "cross", 1)] * 2,
    "sd3": [("transformer_blocks.{}.attn", "joint", 2)] * 2 + [("transformer_blocks.{}.attn", "joint", 1)],
    "flux": [("transformer_blocks.{}.attn", "joint", 2)] * 2 + [("single_transformer_blocks.{}.attn", "self", 1)] * 3,
    "wan": [("blocks.{}.attn1", "self", 1), ("blocks.{}.attn2", "cross", 1)] * 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_of_diffusers_models(name: str) -> None:
    sites = [r.site for r in find_sites(captured_model(name)[0])]
    counts: dict[str, int] = {}
    expected = []
    for pattern, kind, exits in EXPECTED[name]:
        expected.append((pattern.format(counts.get(pattern, 0)), kind, exits, 2, ""))
        counts[pattern] = counts.get(pattern, 0) + 1
    assert [(s.path, s.kind, len(s.exits), s.heads, s.reason) for s in sites] == expected


def test_helpers_split_and_join_heads() -> None:
    x = tokens()
    assert torch.equal(join_heads(split_heads(x)), x)
