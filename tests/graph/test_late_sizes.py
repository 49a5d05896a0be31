"""Sizes that are known only when the model runs: prompts are packed by their mask, and masks change between prompts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, CacheError, Schedule
from dqar_fx.graph.capture import lift_constants
from dqar_fx.graph.guard import guard_sites
from dqar_fx.graph.lower import Lowerer, resolve_backend
from dqar_fx.graph.partition import Piece, partition
from dqar_fx.graph.sites import find_sites
from dqar_fx.graph.specialise import BufferUse, Outcome, Variant, exit_layout, specialise
from tests.graph.conftest import WIDTH, Attention, capture_call, ops, tokens

STEPS = 4
MASK = torch.tensor([True, True, False, True, False])


@pytest.fixture(autouse=True)
def _one_graph() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        y = y + self.attn(y) * gate
        return y + self.mlp(y)


class Packed(nn.Module):
    """One stream of the image and of those tokens of the text that count."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        y = torch.cat([x, text[mask].unsqueeze(0)], 1)
        for layer in self.layers:
            y = layer(y, timestep)
        return y


class Masked(nn.Module):
    """The mask is looked at within the attention, and what leaves it has the size of its input (Mochi)."""

    class Attn(Attention):
        def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            index = mask.nonzero().flatten()
            packed = torch.cat([x, text[index].unsqueeze(0)], 1)
            return super().forward(packed)[:, : x.shape[1]]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": self.Attn()}) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["attn"](x, text, mask) * timestep
        return x


class TwoParts(nn.Module):
    """The attention hands out image and text apart, each of a size of its own (Framepack with one sample)."""

    class Attn(Attention):
        def forward(self, x: Tensor, text: int) -> tuple[Tensor, Tensor, int]:
            y = super().forward(x)
            image, words = y[:, :-text], y[:, -text:]
            return image, words, image.shape[1] + words.shape[1]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": self.Attn()}) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        text = text[mask].unsqueeze(0)
        y = torch.cat([x, text], 1)
        for layer in self.layers:
            *parts, length = layer["attn"](y, text.shape[1])
            y = y + torch.cat(parts, 1) * timestep / length
        return y


def inputs(step: int = 0, mask: Tensor = MASK) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(1, 4, WIDTH, generator=generator)
    return x, torch.ones(5, WIDTH) * torch.arange(5.0)[:, None], mask, torch.tensor(1.0 - step / STEPS)


def pieces_of(model: nn.Module) -> list[Piece]:
    gm, _ = capture_call(model.eval(), *inputs())
    regions = find_sites(gm)
    assert [r.site.reason for r in regions] == [""] * len(regions)
    whole, _ = lift_constants(guard_sites(gm, regions))
    return partition(whole, regions, fuse=True)


def test_what_finds_a_size_is_a_piece_of_its_own() -> None:
    parts = pieces_of(Packed())
    finding = [p for p in parts if any("getitem" in n.name for n in p.gm.graph.nodes)]
    assert ops(finding[0].gm) == {"getitem": 1}
    assert [len(p.sites) for p in parts].count(1) == 3  # and the blocks are cut as they always are
    inside = pieces_of(Masked())
    assert [set(ops(p.gm)) for p in inside if "nonzero" in ops(p.gm)] == [{"nonzero"}] * 2
    assert sum(len(p.sites) for p in inside) == 2


def variant_of(outcome: Outcome, cache: CacheConfig) -> Variant:
    gm, _ = capture_call(Packed().eval(), *inputs())
    regions = find_sites(gm)
    pieces = partition(lift_constants(guard_sites(gm, regions))[0], regions)
    piece = next(p for p in pieces if p.sites == (1,))
    like = next(n for n in gm.graph.nodes if n.name in regions[1].exits).meta["example_value"]
    return specialise(piece.gm, [outcome], [[exit_layout(like, cache, 2, 1)]], range(len(piece.outputs)))


@pytest.mark.parametrize("granularity", ["token", "tensor", "channel", "head"])
def test_a_value_of_a_late_size_is_returned_for_storing_and_read_from_a_buffer(granularity: str) -> None:
    cache = CacheConfig(granularity=granularity)  # token, whatever was asked for: no size says where the samples are
    stored = variant_of(Outcome.STORE, cache)
    assert (stored.buffers, stored.found) == ((), (BufferUse(0, 0, 0), BufferUse(0, 0, 1)))
    assert "copy_" not in ops(stored.gm)
    read = variant_of(Outcome.REUSE, cache)
    assert (read.buffers, read.found) == ((BufferUse(0, 0, 0), BufferUse(0, 0, 1)), ())
    assert variant_of(Outcome.STORE, CacheConfig(dtype="native")).found == (BufferUse(0, 0, 0),)


def test_numbers_that_follow_from_the_exits_are_read_off_what_is_handed_on() -> None:
    gm, _ = capture_call(TwoParts().eval(), *inputs())
    regions = find_sites(gm)
    assert [(r.site.kind, len(r.exits), r.site.reason) for r in regions] == [("joint", 2, "")] * 2
    assert any(r.sizes for r in regions)
    guarded = guard_sites(gm, regions)
    nodes = {n.name: n for n in guarded.graph.nodes}
    for region in regions:
        for name in region.sizes:
            assert {user.name for user in nodes[name].users} <= region.inside


def test_assertions_about_what_is_not_computed_do_not_keep_it_computing() -> None:
    model = TwoParts().eval()
    dqar_fx.optimize(model, Schedule.interval(2, every=2, warmup=1), backend="eager")
    runtime = dqar_fx.runtime(model)
    with runtime.generation(num_steps=2):
        for i in range(2):
            runtime.begin_step(i)
            model(*inputs(i))
        assert runtime.stats.reused == 2
    (graph,) = runtime.graphs
    called: dict[Outcome, Counter[str]] = {Outcome.STORE: Counter(), Outcome.REUSE: Counter()}
    for outcome, count in called.items():
        for step in graph.build((outcome,) * 2).steps:
            count.update(ops(step.variant.gm))
    assert called[Outcome.STORE]["scaled_dot_product_attention"] == 2
    assert called[Outcome.REUSE]["scaled_dot_product_attention"] == called[Outcome.REUSE]["linear"] == 0
    checks = [called[outcome]["_assert_scalar.default"] for outcome in (Outcome.STORE, Outcome.REUSE)]
    assert 0 < checks[1] < checks[0]  # those about the input stay
    dqar_fx.restore(model)


def test_what_finds_a_size_is_not_compiled() -> None:
    lowerer = Lowerer(resolve_backend("inductor"))
    finding = next(p for p in pieces_of(Packed()) if ops(p.gm) == {"getitem": 1})
    lowered = lowerer.lower(specialise(finding.gm, [], [], [0]), [inputs()[1], MASK])
    (found,) = lowered([inputs()[1], MASK])
    assert (found.shape, lowerer.uncompiled) == ((3, WIDTH), 1)


class Replaying:
    """The eager model; at odd steps each attention gives what it gave at the step before."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step = copy.deepcopy(model), 0
        for layer in self.model.layers:
            layer._modules["attn"] = self._replaying(layer.get_submodule("attn"))

    def _replaying(self, module: nn.Module) -> nn.Module:
        owner = self

        class Replay(nn.Module):
            stored: Any

            def forward(self, *args: Any) -> Any:
                if owner.step % 2 == 0:
                    self.stored = module(*args)
                return self.stored

        return Replay()

    def __call__(self, step: int, mask: Tensor) -> Tensor:
        self.step = step
        result: Tensor = self.model(*inputs(step, mask))
        return result


@pytest.mark.parametrize("make", [Packed, Masked, TwoParts])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_generations_of_other_sizes_reuse_one_after_the_other(make: type[nn.Module], backend: str) -> None:
    model = make().eval()
    replaying = Replaying(model)
    schedule = Schedule.custom(STEPS, lambda step, *_: step % 2 == 1)
    dqar_fx.optimize(model, schedule, cache=CacheConfig(dtype="native"), backend=backend)
    runtime = dqar_fx.runtime(model)
    for mask in (MASK, ~MASK, MASK | True, MASK):
        with runtime.generation(num_steps=STEPS):
            for step in range(STEPS):
                runtime.begin_step(step)
                result, expected = model(*inputs(step, mask)), replaying(step, mask)
                if backend == "eager":
                    assert torch.equal(result, expected)
                else:
                    torch.testing.assert_close(result, expected)
            assert runtime.stats.reused == len(runtime.sites) * STEPS // 2
    assert (runtime.stats.captures, runtime.stats.graph_breaks) == (1, 0)
    dqar_fx.restore(model)


def test_int8_values_of_a_late_size_come_back_close() -> None:
    model = Packed().eval()
    replaying = Replaying(model)
    dqar_fx.optimize(model, Schedule.interval(2, every=2, warmup=1), backend="eager")
    runtime = dqar_fx.runtime(model)
    for mask in (MASK, ~MASK):
        with runtime.generation(num_steps=2):
            for step in range(2):
                runtime.begin_step(step)
                result, expected = model(*inputs(step, mask)), replaying(step, mask)
                assert (result - expected).norm() <= (0.02 if step else 0) * expected.norm()
            assert runtime.stats.reused == 3
    dqar_fx.restore(model)


def test_a_mask_that_changes_in_the_middle_of_a_generation_is_refused_and_never_mixed() -> None:
    model = Packed().eval()
    dqar_fx.optimize(model, Schedule.interval(2, every=2, warmup=1), backend="eager")
    runtime = dqar_fx.runtime(model)
    with runtime.generation(num_steps=2):
        runtime.begin_step(0)
        model(*inputs(0, MASK))
        runtime.begin_step(1)
        with pytest.raises(CacheError, match="a mask has changed in the middle of a generation"):
            model(*inputs(1, MASK & False))
    dqar_fx.restore(model)


def test_sizes_of_inputs_are_not_late() -> None:
    gm, _ = capture_call(nn.Sequential(Attention(), Attention()), tokens(), dynamic=True)
    regions = find_sites(gm)
    assert [p.label for p in partition(guard_sites(gm, regions), regions)] == ["0", "1"]


def test_the_report_says_what_runs_uncompiled() -> None:
    model = dqar_fx.optimize(Packed().eval(), Schedule.none(2), backend="eager")
    with torch.no_grad():
        model(*inputs())
    assert dqar_fx.runtime(model).report().to_dict()["uncompiled_pieces"] > 0
    assert "pieces run as they are, uncompiled" in str(dqar_fx.runtime(model).report())
    dqar_fx.restore(model)
