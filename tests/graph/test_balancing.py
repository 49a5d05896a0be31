"""Which exits are balanced, what that does to their graphs, and what leaves a graph as it is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dqar_fx import Balance, CacheConfig, CacheError
from dqar_fx.graph.capture import readable
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.specialise import Outcome
from dqar_fx.runtime.program import CapturedGraph
from tests.graph.conftest import WIDTH, Attention, Block, Transformer, capture, captured_model, tokens
from tests.graph.test_keys_values import Flex, Grouped, OneTensor, Separate, Twice

KEYS = CacheConfig("kv", balance="dynamic")
OUTPUTS = CacheConfig(balance="dynamic")


def program(gm: fx.GraphModule, cache: CacheConfig) -> CapturedGraph:
    regions = [r for r in find_stored(gm, cache.target) if not r.site.reason]
    return CapturedGraph(gm, regions, cache, Lowerer(lambda gm, _: gm), {})


@functools.cache
def captured(make: type[nn.Module]) -> fx.GraphModule:
    """One block with this attention, captured once for all tests (no pass may change the graph that it is given)."""
    return capture(Transformer(Block(make)).eval(), tokens(), torch.tensor(1.0))


def texts(graph: CapturedGraph, outcome: Outcome) -> list[str]:
    return [readable(step.variant.gm) for step in graph.build((outcome,) * graph.num_sites).steps]


@pytest.mark.parametrize(("make", "groups"), [(Separate, 1), (Grouped, 2), (Attention, 1)])
def test_keys_are_balanced_towards_the_queries_that_meet_them_and_values_are_not(
    make: type[nn.Module], groups: int
) -> None:
    graph = program(captured(make), KEYS)
    ((key, value),) = graph.layouts
    assert (key.balance, key.of_keys, key.groups, key.parts) == ("dynamic", True, groups, 3)
    assert (value.balance, value.parts) == ("", 2)
    assert not graph.unbalanced
    values, scales, factors = graph.specs(())[0][0].allocate()
    assert factors.shape == (2, 2 // groups, 1, 8)
    assert (values.dtype, scales.dtype, factors.dtype) == (torch.int8, torch.float32, torch.float32)


class OverKeyOfOne(Separate):
    """A key for each head, but one sample of it: the queries of all samples meet it."""

    def operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:1], v[:1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OneTensor, "its keys are its values"),
        (Flex, "its queries cannot be scaled: it is no plain scaled_dot_product_attention"),
        (OverKeyOfOne, "its queries and keys differ in samples or heads"),
    ],
)
@pytest.mark.parametrize("outcome", [Outcome.STORE, Outcome.REUSE])
def test_what_cannot_be_balanced_has_its_reason_and_the_graph_it_had(
    make: type[nn.Module], reason: str, outcome: Outcome
) -> None:
    gm = captured(make)
    graph = program(gm, KEYS)
    assert reason in graph.unbalanced[0]
    assert texts(graph, outcome) == texts(program(gm, CacheConfig("kv")), outcome)


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig("kv"), CacheConfig("kv", "int4", group=4)])
def test_without_a_balance_no_graph_knows_of_it(cache: CacheConfig) -> None:
    gm = captured(Separate)
    graph = program(gm, cache)
    assert all(layout.parts == 2 for own in graph.layouts for layout in own)
    for outcome in (Outcome.STORE, Outcome.REUSE):
        assert not any(word in text for text in texts(graph, outcome) for word in ("int32", "rsqrt", "sqrt"))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(0, 1).unsqueeze(1) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(0, 1))


def test_outputs_whose_samples_cannot_be_told_apart_are_balanced_by_calibration_only() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = SequenceFirst()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)

    gm = capture(Model().eval(), torch.randn(5, 2, WIDTH))
    graph = program(gm, OUTPUTS)
    assert "first dimension is not that of the samples" in graph.unbalanced[0]
    assert graph.layouts[0][0].balance == ""
    calibrated = Balance("output", {"attn/0": torch.full((1, 1, WIDTH), 2.0)}, 1)
    graph = program(gm, CacheConfig(balance=calibrated))
    assert not graph.unbalanced
    assert graph.layouts[0][0].balance == "given"


def calls(graph: CapturedGraph, outcome: Outcome) -> list[str]:
    return [line for text in texts(graph, outcome) for line in text.splitlines()]


@pytest.mark.parametrize("make", [Separate, Grouped])
def test_reading_scales_the_queries_and_only_them(make: type[nn.Module]) -> None:
    gm = captured(make)
    graph = program(gm, KEYS)
    (step,) = (step for step in graph.build((Outcome.REUSE,)).steps if step.variant.buffers)
    nodes = list(step.variant.gm.graph.nodes)
    factors = next(n for n in nodes if n.op == "placeholder" and n.name == "stored_2")
    reached, pending = set(), [factors]
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending += [] if "attention" in str(node.target) else list(node.users)
    (attention,) = (n for n in nodes if "attention" in str(n.target))
    query, key, value = attention.args[:3]
    assert query in reached
    assert key not in reached
    assert value not in reached
    plain = program(gm, CacheConfig("kv"))
    assert len(calls(graph, Outcome.COMPUTE)) == len(calls(plain, Outcome.COMPUTE))
    more = len(calls(graph, Outcome.REUSE)) - len(calls(plain, Outcome.REUSE))
    # The factors, two views of their bits and a difference, the dtype of the queries, the factors in it, the product.
    assert more == 7 + (make is Grouped)


@pytest.mark.parametrize(
    "factors",
    [{"attn/0": torch.ones(1, 1, 1, 8)}, {"blocks.0.attn/0": torch.ones(1, 1, 1, 9)}],
)
def test_another_models_balance_is_refused(factors: dict[str, Tensor]) -> None:
    with pytest.raises(CacheError, match=r"balance (has no factors for|of) blocks\.0\.attn"):
        program(captured(Separate), CacheConfig("kv", balance=Balance("kv", factors, 1)))


@pytest.mark.parametrize("target", ["output", "kv"])
def test_each_site_has_a_name_of_its_own(target: str) -> None:
    for gm in (captured(Twice), captured_model("dit")[0]):
        keys = [region.key for region in find_stored(gm, target)]
        assert len(set(keys)) == len(keys)
        assert all(region.key.startswith(region.site.path) for region in find_stored(gm, target))


def test_equal_blocks_share_their_code_whatever_their_factors() -> None:
    gm = captured_model("dit")[0]
    names = [region.key for region in find_stored(gm, "output")]
    calibrated = Balance("output", {f"{n}/0": torch.full((1, 1, 16), 2.0**i) for i, n in enumerate(names)}, 1)

    def variants(cache: CacheConfig) -> int:
        known: dict[object, Any] = {}
        regions = find_stored(gm, "output")
        graph = CapturedGraph(gm, regions, cache, Lowerer(lambda gm, _: gm), known)
        for outcome in (Outcome.STORE, Outcome.REUSE):
            graph.build((outcome,) * graph.num_sites)
        return len(known)

    assert variants(CacheConfig(balance=calibrated)) == variants(OUTPUTS) == variants(CacheConfig())
    graph = program(gm, CacheConfig(balance=calibrated))
    assert [own[0].allocate()[2].unique().tolist() for own in graph.specs(())] == [[1.0], [2.0], [4.0]]


def test_the_guarded_graph_is_the_same_with_and_without() -> None:
    gm = captured(Separate)
    assert readable(program(gm, KEYS).guarded) == readable(program(gm, CacheConfig("kv")).guarded)
