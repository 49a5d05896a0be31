"""Which operators and which products count as an attention, and what takes part in it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dqar_fx.graph.attentions import attends, dropout_probability, is_attention
from dqar_fx.graph.effects import target_name
from dqar_fx.graph.sites import Region, find_sites
from tests.graph.conftest import WIDTH, Attention, attend, capture, join_heads, split_heads, tokens


class Residual(nn.Module):
    """A residual around one module."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for module in self.children():
            y = module(x, *others)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x * 2


class Softmax(Attention):
    """Written out: ``softmax(q k') v``."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split_heads, self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH / 2)).softmax(-1)
        return self.out(join_heads(weights @ v))


class Linear(Attention):
    """Written out without a softmax: ``q (k' v)`` over its normaliser."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split_heads, self.qkv(x).relu().chunk(3, -1))
        numerator = torch.matmul(q, torch.matmul(k.transpose(-1, -2), v))
        return self.out(join_heads(numerator / (torch.matmul(q, k.sum(-2).unsqueeze(-1)) + 1)))


class Einsum(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v))


class FoldedHeads(Attention):
    """Heads folded into the batch, scores by ``baddbmm``, the result written slice by slice into a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        result = torch.zeros_like(q)
        for i in range(q.shape[0]):
            scores = torch.baddbmm(torch.empty(1, 5, 5), q[i : i + 1], k[i : i + 1].transpose(1, 2), beta=0, alpha=0.3)
            result[i : i + 1] = torch.bmm(F.softmax(scores, -1), v[i : i + 1])
        return self.out(join_heads(result.unflatten(0, (2, 2))))


class LearnedQuery(Attention):
    """Pools by a query of its own: a softmax over activations and one product."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.qkv(x).chunk(3, -1)
        return self.out((self.query @ k.transpose(1, 2)).softmax(-1) @ v)


class Flex(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split_heads, self.qkv(x).chunk(3, -1))
        return self.out(join_heads(flex_attention(q, k, v, score_mod=lambda score, _b, _h, i, j: score + (i - j))))


class FlexMask(Attention):
    """Makes its mask inside, which vmaps and writes in place."""

    def forward(self, x: Tensor) -> Tensor:
        mask = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, x.shape[1], x.shape[1], device="cpu")
        q, k, v = map(split_heads, self.qkv(x).chunk(3, -1))
        return self.out(join_heads(flex_attention(q, k, v, block_mask=mask)))


class MultiHead(nn.Module):
    """``nn.MultiheadAttention`` as it is used with itself as keys and values."""

    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=self.need_weights)[0]


def only(model: nn.Module, *inputs: Tensor) -> Region:
    (region,) = find_sites(capture(model.eval(), *(inputs or (tokens(),))))
    assert region.site.reason == ""
    return region


@pytest.mark.parametrize(
    ("make", "attention", "batch", "heads"),
    [
        (Softmax, "matmul", 2, 2),
        (Linear, "matmul", 2, 2),
        (Einsum, "einsum", 2, None),
        (FoldedHeads, "baddbmm", 1, None),
        (LearnedQuery, "softmax", 2, None),
        (Flex, "flex_attention", 2, 2),
        (FlexMask, "flex_attention", 2, 2),
    ],
)
def test_an_attention_without_the_usual_operator_is_a_site(
    make: Callable[[], nn.Module], attention: str, batch: int, heads: int | None
) -> None:
    gm = capture(Residual(attn=make()).eval(), tokens())
    (region,) = find_sites(gm)
    site = region.site
    assert (site.path, site.owner, site.kind, site.reason) == ("attn", make.__name__, "self", "")
    assert (region.batch, site.heads) == (batch, heads)
    assert site.shapes == ((2, 5, WIDTH),)
    (leaving,) = [n for n in gm.graph.nodes if n.name in site.exits]
    assert target_name(leaving) == "linear"
    assert attention in {target_name(n) for n in gm.graph.nodes if n.name in region.attentions}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_nn_multihead_attention_is_a_site_whatever_it_returns(batch_first: bool, need_weights: bool) -> None:
    region = only(Residual(mix=MultiHead(batch_first=batch_first, need_weights=need_weights)), tokens(3, 5))
    assert (region.site.path, region.site.owner, region.site.kind) == ("mix.mha", "MultiheadAttention", "self")
    assert (region.site.heads, region.batch) == (2, 3 if batch_first else 5)
    assert len(region.exits) == 1  # nobody reads the weights


class BothResults(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attn(x, x, x)
        return x + y * weights.mean()


def test_weights_that_are_read_are_an_exit_too() -> None:
    region = only(BothResults(attn=nn.MultiheadAttention(WIDTH, 2, batch_first=True)))
    assert sorted(map(len, region.site.shapes)) == [3, 3]
    assert (2, 5, 5) in region.site.shapes


def test_a_fused_encoder_layer_is_named_and_left_alone() -> None:
    model = Residual(layer=nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)).eval()
    (region,) = find_sites(capture(model, tokens()))
    assert (region.site.path, region.exits) == ("layer", ())
    assert "torch.backends.mha.set_fastpath_enabled(False)" in region.site.reason
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch._dynamo.reset()
        assert only(model).site.path == "layer.self_attn"  # as the reason says
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# -- what is no attention -------------------------------------------------------------------------------------------


class AttentionNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class AttentionProjection(Attention):
    """Products with parameters only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.out.weight @ self.out.weight)


class AttentionGate(Attention):
    """A softmax that weighs channels, and no product."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean(1, keepdim=True)).softmax(-1) * x.relu()


class AttentionBias(Attention):
    """One product of two activations: nothing reads tokens by it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ x.transpose(1, 2)).mean(-1, keepdim=True) * self.out.bias)


@pytest.mark.parametrize("make", [AttentionNorm, AttentionProjection, AttentionGate, AttentionBias])
def test_a_module_is_no_site_by_its_name_alone(make: Callable[[], nn.Module]) -> None:
    assert find_sites(capture(Residual(attn=make()), tokens())) == []


class Mixing(Softmax):
    pass


def test_products_alone_make_no_site_without_a_name() -> None:
    assert find_sites(capture(Residual(mix=Mixing()), tokens())) == []
    assert only(Residual(attn=Mixing())).site.owner == "Mixing"


class SoftmaxAttentionBlock(Softmax):
    """Calls itself an attention, and adds its own input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_a_block_with_its_attention_written_out_hands_out_the_value_before_the_residual() -> None:
    gm = capture(Residual(block=SoftmaxAttentionBlock()), tokens())
    (region,) = find_sites(gm)
    (leaving,) = [n for n in gm.graph.nodes if n.name in region.exits]
    assert (region.site.path, region.site.owner, target_name(leaving)) == ("block", "", "linear")


class Core(nn.Module):
    """No parameters."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


class StraightCore(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Core()

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True) * self.out(self.attention(*self.qkv(x).chunk(3, -1)))


def test_a_core_without_parameters_leaves_through_the_projection_behind_it() -> None:
    gm = capture(Residual(block=StraightCore()), tokens())
    (region,) = find_sites(gm)
    (leaving,) = [n for n in gm.graph.nodes if n.name in region.exits]
    assert (region.site.owner, target_name(leaving)) == ("", "linear")


class Both(Attention):
    """A usual attention around one that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_attn = Linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(*self.qkv(self.linear_attn(x)).chunk(3, -1)))


def test_one_within_another_is_one_site() -> None:
    region = only(Residual(attn=Both()))
    assert (region.site.path, region.site.owner) == ("attn", "Both")
    assert len(region.attentions) == 3  # two products (the normaliser is none that another one reads), one operator


class CrossLinear(Attention):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, _, _ = self.qkv(x).chunk(3, -1)
        _, k, v = self.qkv(text).chunk(3, -1)
        return self.out(q @ (k.transpose(1, 2) @ v))


class CrossSoftmax(Attention):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, _, _ = self.qkv(x).chunk(3, -1)
        _, k, v = self.qkv(text).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


@pytest.mark.parametrize("make", [CrossLinear, CrossSoftmax])
def test_keys_of_another_stream_make_it_cross(make: Callable[[], nn.Module]) -> None:
    assert only(Residual(attn=make()), tokens(), tokens(length=3)).site.kind == "cross"


# -- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scaled_dot_product_attention", True),
        ("_flash_attn_forward", True),
        ("memory_efficient_attention.default", True),
        ("multi_head_attention_forward", True),
        ("linear", False),
        ("create_attention_mask", False),
    ],
)
def test_an_operator_is_an_attention_by_its_name(name: str, expected: bool) -> None:
    assert attends(name) is expected


def call(function: object, *args: object, **kwargs: object) -> fx.Node:
    return fx.Graph().call_function(function, args, kwargs)  # type: ignore[arg-type]


def test_dropout_is_read_off_each_operator() -> None:
    assert dropout_probability(call(F.scaled_dot_product_attention, 1, 2, 3)) == 0
    assert dropout_probability(call(F.scaled_dot_product_attention, 1, 2, 3, None, 0.1)) == 0.1
    assert dropout_probability(call(F.scaled_dot_product_attention, 1, 2, 3, dropout_p=0.2)) == 0.2
    heads = (1, 2, 3, WIDTH, 4, None, None, None, None, False)
    assert dropout_probability(call(F.multi_head_attention_forward, *heads, 0.3, None, None)) == 0.3
    assert dropout_probability(call(F.multi_head_attention_forward, *heads, 0.3, None, None, False)) == 0
    assert dropout_probability(call(F.multi_head_attention_forward, *heads, 0.3, None, None, training=False)) == 0


def operator(value: Tensor, *given: Tensor, name: str = "flash_attn") -> fx.Node:
    """A call of an operator of that name that returns ``value``."""

    def function() -> None: ...

    function.__name__ = name
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(given))]
    for node, tensor in zip(nodes, given, strict=True):
        node.meta["example_value"] = tensor
    made = graph.call_function(function, tuple(nodes))
    made.meta["example_value"] = value
    return made


def test_a_kernel_of_somebody_elses_is_an_attention_if_it_takes_and_returns_activations() -> None:
    x, index = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    assert is_attention(operator(x, x, x, x))
    assert is_attention(operator(x, x, x, x, index))
    assert is_attention(operator(x, x, name="flash_attn_qkvpacked_func"))
    assert not is_attention(operator(x, x, name="attn_bias"))
    assert not is_attention(operator(x, x, x, index))
    assert not is_attention(operator(index, x, x, x))
    assert not is_attention(operator(x, x, x, x, name="linear"))
