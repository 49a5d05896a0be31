"""What is stored of an attention whose keys and values are kept, and what is left of the graph when they are read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import flex_attention

from dqar_fx import CacheConfig
from dqar_fx.graph.attentions import is_attention
from dqar_fx.graph.capture import readable
from dqar_fx.graph.flops import Work
from dqar_fx.graph.guard import guard_nodes, guard_sites
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.specialise import Outcome
from dqar_fx.runtime.program import CapturedGraph
from tests.graph.conftest import (
    MODELS,
    WIDTH,
    Attention,
    Block,
    Transformer,
    attend,
    capture,
    capture_call,
    captured_model,
    equal,
    join_heads,
    ops,
    split_heads,
    tokens,
)


class Separate(nn.Module):
    """Three projections, a norm on queries and keys, an out-projection."""

    def __init__(self, keys: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)
        self.out = nn.Linear(WIDTH, WIDTH)

    def operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.rms_norm(split_heads(y), (WIDTH // 2,)) for y in (self.q(x), self.k(x)))
        return self.out(join_heads(self.operator(q, k, split_heads(self.v(x)))))


class Grouped(Separate):
    """Two heads of queries to one of keys and values."""

    def __init__(self) -> None:
        super().__init__(WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        return self.out(join_heads(F.scaled_dot_product_attention(split_heads(self.q(x)), k, v, enable_gqa=True)))


class ByName(Separate):
    def operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query=q, value=v, key=k)


class Flex(Separate):
    def operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v)  # type: ignore[return-value]  # a tensor, where no log-sum-exp is asked for


class Rotated(Separate):
    """Keys that are filled in place, as Wan's rotary embedding does."""

    def operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = torch.empty_like(k)
        turned[..., 0::2] = k[..., 1::2]
        turned[..., 1::2] = -k[..., 0::2]
        return F.scaled_dot_product_attention(q, turned, v)


class OneTensor(Separate):
    """Keys that are the values."""

    def operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, v, v)


class Bare(Separate):
    """Queries, keys and values that are one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = split_heads(self.q(x))
        return self.out(join_heads(F.scaled_dot_product_attention(y, y, y)))


class LearnedKeys(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, 2, 7, WIDTH // 2))

    def operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self.memory.exp().expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, keys, torch.cat([v, v[:, :, :2]], 2))


class Twice(Separate):
    """Two operators in one module, the second of which attends over what the first gave."""

    def forward(self, x: Tensor) -> Tensor:
        first = attend(self.q(x), self.k(x), self.v(x))
        return self.out(attend(self.q(x), self.k(first), self.v(first)))


class OverInput(nn.Module):
    """Keys and values that the model is given as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(self.q(x), x, x))


class WrittenOut(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return result


def program(gm: fx.GraphModule, cache: CacheConfig | None = None) -> CapturedGraph:
    cache = cache or CacheConfig("kv", "native")
    regions = [r for r in find_stored(gm, "kv") if not r.site.reason]
    return CapturedGraph(gm, regions, cache, Lowerer(lambda gm, _: gm), {})


def calls(graph: CapturedGraph, outcome: Outcome) -> Counter[str]:
    """What all pieces together call when every site has this outcome."""
    steps = graph.build((outcome,) * graph.num_sites).steps
    return sum((ops(step.variant.gm) for step in steps), Counter())


def gone(graph: CapturedGraph) -> Counter[str]:
    """What reuse no longer calls."""
    return calls(graph, Outcome.COMPUTE) - calls(graph, Outcome.REUSE)


@pytest.mark.parametrize(
    ("make", "exits", "linears"),
    [
        (Separate, (("key", "value"),), 2),
        (Grouped, (("key", "value"),), 2),
        (ByName, (("key", "value"),), 2),
        (Flex, (("key", "value"),), 2),
        (Rotated, (("key", "value"),), 2),
        (OneTensor, (("both",),), 1),
        (Bare, (("both",),), 0),  # the queries need what the keys are
        (LearnedKeys, (("value",),), 1),
        (Twice, (("key", "value"),) * 2, 5),  # and the first query, which only the second keys needed
        (Attention, (("key", "value"),), 0),  # one projection for all three: the queries need it
    ],
)
@pytest.mark.parametrize("dtype", ["native", "int8"])
def test_the_projections_of_keys_and_values_vanish(
    make: type[nn.Module], exits: tuple[tuple[str, ...], ...], linears: int, dtype: str
) -> None:
    gm = capture(Transformer(Block(make)).eval(), tokens(), torch.tensor(1.0))
    graph = program(gm, CacheConfig("kv", dtype))
    assert tuple(region.roles for region in graph.regions) == exits
    assert gone(graph)["linear"] == linears
    attentions = Counter(n.op for n in gm.graph.nodes if is_attention(n))
    left = sum(is_attention(n) for n in graph.guarded.graph.nodes)
    assert left == attentions.total()
    if make is not Twice:  # there the first attention is only needed for the second one's keys
        assert not {name for name in gone(graph) if "attention" in name}


@pytest.mark.parametrize("make", [Separate, Grouped, ByName, Rotated, OneTensor, Bare, LearnedKeys, Twice, Attention])
def test_guarding_changes_no_bit_and_is_done_once(make: type[nn.Module]) -> None:
    gm, inputs = capture_call(Transformer(Block(make)).eval(), tokens(), torch.tensor(1.0))
    text = readable(gm)
    guarded = guard_sites(gm, find_stored(gm, "kv"))
    assert equal(guarded(*inputs), gm(*inputs))
    assert readable(gm) == text  # the input is untouched
    assert readable(guard_sites(guarded, find_stored(guarded, "kv"))) == readable(guarded)
    guards = set(guard_nodes(guarded.graph))
    assert guards
    assert all(is_attention(reader) for guard in guards for item in guard.users for reader in item.users)


def test_only_the_attention_reads_what_the_guard_hands_on() -> None:
    """What else reads the keys, and a query that is the same tensor, keep the fresh one."""
    gm = capture(Transformer(Block(Bare)).eval(), tokens(), torch.tensor(1.0))
    (guard,) = guard_nodes(guard_sites(gm, find_stored(gm, "kv")).graph)
    (item,) = guard.users
    (attention,) = item.users
    assert attention.args[0] is guard.args[1]
    assert attention.args[1] is attention.args[2] is item


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OverInput, "inputs or parameters as they stand"),
        (WrittenOut, "written out in products"),
        (Packed, "made inside of one operator (multi_head_attention_forward)"),
    ],
)
def test_what_has_no_keys_and_values_to_store_is_left_with_its_reason(make: type[nn.Module], reason: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = make()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)

    (region,) = find_stored(capture(Model().eval(), tokens()), "kv")
    assert reason in region.site.reason
    assert region.site.path.startswith("attn")
    assert region.exits == region.site.exits == ()


#: For each site: the projections of keys and values. Joint attention has those of the text as well.
PROJECTIONS = {
    "dit": [2, 2, 2],
    "pixart": [2, 2] * 2,
    "sd3": [4, 4, 4],
    "flux": [4, 4, 2, 2, 2],
    "wan": [2, 2] * 2,
}


@pytest.mark.parametrize("name", MODELS)
def test_in_diffusers_models_only_queries_are_projected(name: str) -> None:
    graph = program(captured_model(name)[0])
    assert graph.num_sites == len(PROJECTIONS[name])
    counts = calls(graph, Outcome.COMPUTE)
    lost = gone(graph)
    # What leads to the prompt's keys falls away with them (PixArt and Wan embed the prompt, SD3 and Flux add to it).
    text = {"pixart": 2, "wan": 2}.get(name, 0)
    assert lost["linear"] == sum(PROJECTIONS[name]) + text
    attention = "scaled_dot_product_attention"
    assert calls(graph, Outcome.REUSE)[attention] == counts[attention] == graph.num_sites
    assert calls(graph, Outcome.STORE) == counts + Counter(copy_=2 * graph.num_sites)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_the_share_of_the_work_is_that_of_the_projections(name: str) -> None:
    gm, _ = captured_model(name)
    regions = find_stored(gm, "kv")
    work = Work([gm], [regions], CacheConfig("kv"))
    shapes = [region.site.shapes[0] for region in regions]
    # Every token is projected to a key and to a value, from as many channels as all heads have.
    savings = [2 * 2 * b * n * (h * d) ** 2 for b, h, n, d in shapes]
    assert work.site_savings() == savings
    assert work.saved_together() == sum(savings)
    assert work.site_bytes() == [2 * b * h * n * (d + 4) for b, h, n, d in shapes]
    assert work.native_bytes() == [2 * 4 * b * h * n * d for b, h, n, d in shapes]


@pytest.mark.parametrize(
    ("granularity", "scales"),
    [("token", (2, 1, 5, 1)), ("tensor", (2, 1, 1, 1)), ("channel", (2, 1, 1, 8)), ("head", (2, 1, 1, 1))],
)
def test_scales_are_of_the_heads_that_keys_have(granularity: str, scales: tuple[int, ...]) -> None:
    gm = capture(Transformer(Block(Grouped)).eval(), tokens(), torch.tensor(1.0))
    graph = program(gm, CacheConfig("kv", "int8", granularity))
    for spec in graph.specs(())[0]:
        values, found = spec.allocate()
        assert (tuple(values.shape), values.dtype) == ((2, 1, 5, 8), torch.int8)
        assert (tuple(found.shape), found.dtype) == (scales, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [(("native", "int8"), [False, True]), (("int8", "native"), [True, False]), ("int8", [True, True])],
)
def test_keys_and_values_may_be_stored_otherwise(dtype: Any, kinds: list[bool]) -> None:
    gm = capture(Transformer(Block(Separate)).eval(), tokens(), torch.tensor(1.0))
    (layouts,) = program(gm, CacheConfig("kv", dtype)).layouts
    assert [bool(layout.granularity) for layout in layouts] == kinds


def test_one_tensor_that_is_both_is_stored_in_the_more_exact_way() -> None:
    gm = capture(Transformer(Block(OneTensor)).eval(), tokens(), torch.tensor(1.0))
    (layouts,) = program(gm, CacheConfig("kv", ("native", "int8"))).layouts
    assert [layout.granularity for layout in layouts] == [""]


def test_with_sizes_left_open_the_same_vanishes() -> None:
    gm = capture(Transformer(Block(Separate)).eval(), tokens(), torch.tensor(1.0), dynamic=True)
    assert gone(program(gm))["linear"] == 2
