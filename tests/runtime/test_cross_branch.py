"""Values shared between branches of guidance: whose they are, when they are taken, and when nothing is."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, ChangeGate, CrossBranch, EntropyGate, GateError, Gates, Schedule
from dqar_fx.runtime.decisions import Decision
from dqar_fx.runtime.program import CapturedGraph
from tests.counting import CountsReads
from tests.models import make_dit, timestep
from tests.runtime.test_interleavings import Attention as Mean
from tests.runtime.test_interleavings import Interleavings, Run

STEPS = 12
SITES = 3
SCHEDULE = Schedule.interval(STEPS, every=3, warmup=2)  # computes at 0, 1, 4, 7 and 10; 0 is not stored
PAIR = ("cond", "uncond")
NATIVE, INT8 = CacheConfig(dtype="native"), CacheConfig()
LABELS = {"cond": [1, 2], "uncond": [3, 4], "other": [5, 6]}


def sharing(threshold: float = math.inf, **others: Any) -> Gates:
    refresh = others.pop("refresh", 99)
    return Gates(
        **{"entropy": None, "snr": None, **others}, cross_branch=CrossBranch(threshold, refresh=refresh)
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (2, 8)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn1, self.up, self.down = nn.LayerNorm(16), Attention(), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attn1(self.norm(x) * condition)
        return x + self.down(self.up(x).relu())


class Small(nn.Module):
    """As a DiT is called, and captured in a fraction of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.labels = nn.Linear(16, 16), nn.Embedding(10, 16)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(SITES))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        condition = (1 + 0.3 * self.labels(class_labels) + timestep[:, None] / 1000)[:, None]
        tokens = self.embed(x.reshape(len(x), 16, 16))
        for block in self.transformer_blocks:
            tokens = block(tokens, condition)
        return tokens.reshape(x.shape)


def make_small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def predict(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    result = model(*args, **kwargs)
    return result if isinstance(result, Tensor) else result.sample


Enter = Callable[[int, str], contextlib.AbstractContextManager[Any]]


def guided(
    model: nn.Module, enter: Enter, order: Callable[[int], Sequence[str]] = lambda _: PAIR, *, anew: bool = False
) -> dict[tuple[int, str], Tensor]:
    """One generation with a call for each branch of a step: every prediction. ``anew``: latents copied for each."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = {name: torch.tensor(label) for name, label in LABELS.items()}
    found: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad():
        for step in range(STEPS):
            t, noise = timestep(step, STEPS), {}
            for name in order(step):
                with enter(step, name):
                    given = x.clone() if anew else x
                    noise[name] = predict(model, given, timestep=t, class_labels=labels[name])
            found |= {(step, name): value for name, value in noise.items()}
            first, *others = noise.values()
            x = x - 0.2 * (first + sum(0.5 * (first - other) for other in others))
    return found


def make(
    gates: Gates | None,
    schedule: Schedule = SCHEDULE,
    cache: CacheConfig = NATIVE,
    *,
    kind: Callable[[], nn.Module] = make_small,
    **others: Any,
) -> tuple[nn.Module, dqar_fx.Runtime, Enter]:
    model = dqar_fx.optimize(kind(), schedule, gates=gates, cache=cache, **{"backend": "eager", **others})
    runtime = dqar_fx.runtime(model)
    return model, runtime, lambda _, name: runtime.branch(name)


@functools.cache
def run(
    gates: Gates | None, *args: Any, order: Callable[[int], Sequence[str]] = lambda _: PAIR, **others: Any
) -> tuple[dict[tuple[int, str], Tensor], dqar_fx.Runtime]:
    model, runtime, enter = make(gates, *args, **others)
    return guided(model, enter, order), runtime


class Oracle:
    """An eager model whose attentions are handed what was decided: theirs, their last, or the first branch's."""

    def __init__(self, decisions: Sequence[Decision], cache: CacheConfig, kind: Callable[[], nn.Module]) -> None:
        self.model = kind()
        self.decided = {(d.step, d.branch, d.site): d for d in decisions}
        self.quantised = cache.dtype == "int8"
        self.held: dict[tuple[str, int], tuple[int, Tensor]] = {}
        self.at, self.first = (-1, ""), ""
        for site, block in enumerate(self.model.transformer_blocks):
            block.attn1.forward = functools.partial(self.attend, site, block.attn1.forward)

    @contextlib.contextmanager
    def enter(self, step: int, name: str) -> Iterator[None]:
        if step != self.at[0]:
            self.first = name
        self.at = step, name
        yield

    def attend(self, site: int, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        step, name = self.at
        decision = self.decided[step, name, site]
        if decision.reason == "shared":
            assert decision.action == "reuse"
            assert self.held[self.first, site][0] == step
            self.held[name, site] = self.held[self.first, site]
        if decision.action == "reuse":
            return self.held[name, site][1]
        output = original(*args, **kwargs)
        stored = dqar_fx.dequantize(*dqar_fx.quantize(output)) if self.quantised else output.clone()
        self.held[name, site] = step, stored
        return output


def assert_replayed(
    found: dict[tuple[int, str], Tensor],
    runtime: dqar_fx.Runtime,
    cache: CacheConfig = NATIVE,
    order: Callable[[int], Sequence[str]] = lambda _: PAIR,
    kind: Callable[[], nn.Module] = make_small,
) -> None:
    oracle = Oracle(runtime.stats.decisions, cache, kind)
    expected = guided(oracle.model, oracle.enter, order)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def reasons(runtime: dqar_fx.Runtime, branch: str, site: int = 0) -> list[str]:
    return [d.reason for d in runtime.stats.decisions if d.branch == branch and d.site == site]


def counted(runtime: dqar_fx.Runtime) -> Counter[tuple[str, str]]:
    return Counter((d.branch, d.reason) for d in runtime.stats.decisions)


@pytest.mark.parametrize("cache", [NATIVE, INT8], ids=str)
@pytest.mark.parametrize("schedule", [Schedule.interval(STEPS, every=2, warmup=1), Schedule.none(STEPS)], ids=str)
def test_what_is_shared_is_to_the_bit_what_the_first_branch_stored(cache: CacheConfig, schedule: Schedule) -> None:
    found, runtime = run(sharing(), schedule, cache)
    assert runtime.stats.shared > 0
    assert_replayed(found, runtime, cache)


def test_the_same_of_a_dit() -> None:
    found, runtime = run(sharing(0.8, refresh=2), SCHEDULE, INT8, kind=make_dit)
    assert counted(runtime)["uncond", "shared"] > 0
    assert counted(runtime)["uncond", "stale"] > 0
    assert_replayed(found, runtime, INT8, kind=make_dit)


def test_after_one_measurement_the_second_branch_computes_no_more() -> None:
    _, runtime = run(sharing())
    read = ["reuse", "reuse"]
    for site in range(SITES):
        assert reasons(runtime, "cond", site) == ["warmup"] * 2 + read + (["stale", *read] * 3)[:8]
        assert reasons(runtime, "uncond", site) == ["warmup"] * 2 + read + (["shared", *read] * 3)[:8]
    stats = runtime.stats
    assert stats.shared == 3 * SITES
    assert (stats.reused, stats.computed) == ((7 + 10) * SITES, (5 + 2) * SITES)
    assert stats.reuse_ratio == 17 / 24
    assert [(m.step, m.branch, m.site) for m in stats.measurements] == [(1, "uncond", site) for site in range(SITES)]
    assert all(math.isnan(m.change) and math.isnan(m.entropy) for m in stats.measurements)  # nobody asked


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.none(STEPS)], ids=str)
@pytest.mark.parametrize("cache", [NATIVE, INT8], ids=str)
def test_at_a_threshold_of_0_nothing_is_shared_and_nothing_changes(cache: CacheConfig, schedule: Schedule) -> None:
    found, runtime = run(sharing(0.0), schedule, cache)
    plain, static = run(None, schedule, cache)
    assert all(torch.equal(found[key], value) for key, value in plain.items())
    assert runtime.stats.decisions == static.stats.decisions
    assert {m.site for m in runtime.stats.measurements} == set(range(SITES))


@pytest.mark.parametrize("cache", [NATIVE, INT8], ids=str)
def test_what_is_measured_is_how_far_the_branches_are_apart(cache: CacheConfig) -> None:
    _, runtime = run(sharing(0.0), Schedule.none(STEPS), cache)
    plain, outputs = make_small(), {}
    at = [(-1, "")]
    for site, block in enumerate(plain.transformer_blocks):
        block.attn1.register_forward_hook(lambda *a, site=site: outputs.__setitem__((*at[0], site), a[-1]))

    @contextlib.contextmanager
    def enter(step: int, name: str) -> Iterator[None]:
        at[0] = step, name
        yield

    guided(plain, enter)
    measured = {(m.step, m.site): m.difference for m in runtime.stats.measurements}
    # By what the last two steps measure nothing can be decided, and at step 0 nobody knows of a second branch.
    assert set(measured) == {(step, site) for step in range(1, STEPS - 2) for site in range(SITES)}
    for (step, site), difference in measured.items():
        own, other = outputs[step, "uncond", site], outputs[step, "cond", site]
        if cache.dtype == "int8":
            other = dqar_fx.dequantize(*dqar_fx.quantize(other))
        expected = ((own - other).norm(dim=(1, 2)) / own.norm(dim=(1, 2))).mean()
        assert difference == pytest.approx(float(expected), rel=1e-4)


def test_a_threshold_in_between_shares_some_sites() -> None:
    _, apart = run(sharing(0.0))
    differences = sorted(m.difference for m in apart.stats.measurements)
    found, runtime = run(sharing(differences[len(differences) // 2]))
    assert counted(runtime)["uncond", "shared"] > 0
    assert counted(runtime)["uncond", "stale"] > 0
    assert_replayed(found, runtime)


def test_every_sample_has_to_be_close_where_that_is_asked() -> None:
    _, apart = run(sharing(0.0))
    first = [m.difference for m in apart.stats.measurements if m.step == 1]
    limit = max(first) * 1.0001
    for asked in ({"per_sample": True}, {}):
        _, runtime = run(sharing(limit, **asked), Schedule.interval(STEPS, every=9, warmup=2))
        shared = runtime.stats.shared
        assert shared < SITES if asked else shared == SITES


def test_a_measurement_is_renewed() -> None:
    found, runtime = run(sharing(refresh=2), Schedule.none(STEPS))
    own, other = "warmup", "shared"  # a schedule that reuses nothing calls all of its steps a warm-up
    assert reasons(runtime, "uncond") == [own] * 3 + [other, other, own] * 2 + [other, other, own]
    assert sorted({m.step for m in runtime.stats.measurements}) == [1, 2, 5, 8]
    assert_replayed(found, runtime)


def swapped(step: int) -> Sequence[str]:
    return PAIR[::-1] if 4 <= step < 8 else PAIR


def test_where_the_branches_change_places_the_first_one_lends() -> None:
    found, runtime = run(sharing(), Schedule.interval(STEPS, every=2, warmup=2), order=swapped)
    # Computes at 1, 3, 5, 7, 9, 11. At 5, "cond" is second for the first time, and measured; at 7 it takes.
    assert reasons(runtime, "uncond")[1::2] == ["warmup", "shared", "stale", "stale", "shared", "shared"]
    assert reasons(runtime, "cond")[1::2] == ["warmup", "stale", "stale", "shared", "stale", "stale"]
    assert_replayed(found, runtime, order=swapped)


def test_a_third_branch_takes_from_the_first_too() -> None:
    def order(step: int) -> Sequence[str]:
        return (*PAIR, "other") if step < 8 else ("uncond", "cond", "other")

    found, runtime = run(sharing(), Schedule.interval(STEPS, every=2, warmup=2), order=order)
    assert reasons(runtime, "other")[1:8:2] == ["warmup", "shared", "shared", "shared"]
    # What is known of it and "cond" says nothing of it and "uncond".
    assert reasons(runtime, "other")[9::2] == ["stale", "shared"]
    assert_replayed(found, runtime, order=order)


def test_a_step_without_the_first_branch_is_computed() -> None:
    def order(step: int) -> Sequence[str]:
        return PAIR if step != 7 else ("uncond",)

    found, runtime = run(sharing(), order=order)
    assert reasons(runtime, "uncond")[4::3] == ["shared", "stale", "shared"]
    assert_replayed(found, runtime, order=order)


def test_a_step_without_the_second_branch_leaves_it_nothing_to_read() -> None:
    def order(step: int) -> Sequence[str]:
        return PAIR if step != 7 else ("cond",)

    found, runtime = run(sharing(), order=order)
    # At 8 the plan asks for a value of step 7, and it has none.
    assert reasons(runtime, "uncond")[4:9] == ["shared", "reuse", "reuse", "stale", "reuse"]
    assert_replayed(found, runtime, order=order)


def test_a_value_that_the_first_branch_overwrites_early_is_read_no_more() -> None:
    """A loan is good for as long as the lender keeps it: of "cond" alone a gate blocks what the plan would reuse."""
    from dqar_fx.gates import BudgetGate

    blocks = [False]
    allows = BudgetGate.allows

    def once(self: BudgetGate, candidate: Any) -> bool:
        return not blocks[0] and allows(self, candidate)

    model, runtime, enter = make(sharing(max_reuse=9), Schedule.always(STEPS, warmup=2))

    @contextlib.contextmanager
    def at(step: int, name: str) -> Iterator[None]:
        # Both are blocked at 4, so that "uncond" takes a value; at 6 only "cond" is.
        blocks[0] = step == 4 or (step == 6 and name == "cond")
        with enter(step, name):
            yield

    with mock.patch.object(BudgetGate, "allows", once):
        found = guided(model, at)
    assert reasons(runtime, "cond")[3:8] == ["reuse", "budget", "reuse", "budget", "reuse"]
    assert reasons(runtime, "uncond")[3:8] == ["reuse", "shared", "reuse", "shared", "reuse"]
    assert_replayed(found, runtime)


@pytest.mark.parametrize(
    "gate", [{"change": ChangeGate(0.3)}, {"entropy": EntropyGate(2.5)}, {"max_reuse": 1}], ids=str
)
def test_gates_ask_of_what_was_taken_what_they_ask_of_the_first_branch(gate: dict[str, Any]) -> None:
    """So that both read, or both do not; but for an entropy, which each has its own of until it has taken a value."""
    own = "entropy" in gate
    schedule = Schedule.always(STEPS, warmup=2)
    found, runtime = run(sharing(**gate), schedule)
    assert_replayed(found, runtime)
    assert runtime.stats.shared > 0
    assert counted(runtime)["cond", "reuse"] > 0
    for site in range(SITES):
        for cond, uncond in zip(reasons(runtime, "cond", site)[5:], reasons(runtime, "uncond", site)[5:], strict=True):
            assert uncond == "reuse" if cond == "reuse" else uncond in ({"shared", "reuse"} if own else {"shared"})


def test_runs_at_random_equal_the_oracle() -> None:
    chance = random.Random(0)
    shared = 0
    for _ in range(6):
        orders = [chance.sample([*PAIR, "other"], k=chance.choice([1, 2, 3])) for _ in range(STEPS)]
        if chance.random() < 0.5:
            orders = [sorted(order) for order in orders]
        pattern = [[chance.random() < 0.4 for _ in range(SITES)] for _ in range(STEPS)]
        schedule = Schedule.custom(STEPS, lambda t, s, *_, pattern=pattern: t > 0 and pattern[t][s])
        limits = {"max_reuse": chance.choice([None, 1, 2]), "change": chance.choice([None, ChangeGate(0.1)])}
        gates = sharing(chance.choice([0.5, math.inf]), refresh=chance.choice([1, 2, 9]), **limits)
        cache = chance.choice([NATIVE, INT8])
        found, runtime = run(gates, schedule, cache, order=orders.__getitem__)
        assert_replayed(found, runtime, cache, orders.__getitem__)
        shared += runtime.stats.shared
    assert shared > 30


def test_after_an_exception_in_the_first_branch_the_second_begins_anew() -> None:
    model, runtime, enter = make(sharing())
    calls = [0]
    original = CapturedGraph.run

    def fails_at_4(self: CapturedGraph, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:  # "cond" at step 4
            raise MemoryError
        return original(self, *args)

    x, labels = torch.randn(2, 4, 8, 8), {name: torch.tensor(label) for name, label in LABELS.items()}
    plain = make_small()
    with mock.patch.object(CapturedGraph, "run", fails_at_4), torch.no_grad():
        for step in range(6):
            for name in PAIR:
                with enter(step, name):
                    given = {"timestep": timestep(step, STEPS), "class_labels": labels[name]}
                    if (step, name) == (4, "cond"):
                        with pytest.raises(MemoryError):
                            model(x, **given)
                        continue
                    result = model(x, **given)
                    if (step, name) == (4, "uncond"):
                        assert torch.equal(result, plain(x, **given))
    assert runtime.stats.shared == 0
    assert [(d.step, d.branch) for d in runtime.stats.decisions][::SITES] == [(0, "uncond"), (1, "cond"), (1, "uncond")]


def test_another_shape_is_computed() -> None:
    model, runtime, enter = make(sharing(), dynamic=False)
    plain = make_small()
    x, labels = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        for step in range(6):
            for name, batch in zip(PAIR, (4, 2), strict=True):
                given = {"timestep": timestep(step, STEPS, batch), "class_labels": labels[:batch]}
                with enter(step, name):
                    result = model(x[:batch], **given)
                if SCHEDULE.plan(SITES).reuse[step, 0]:
                    continue
                assert torch.equal(result, plain(x[:batch], **given))
    assert runtime.stats.shared == 0
    assert not runtime.stats.measurements
    assert "nothing is shared between branches: none were compared" in str(runtime.report())


class Broken(Small):
    """In two graphs."""

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        condition = (1 + 0.3 * self.labels(class_labels) + timestep[:, None] / 1000)[:, None]
        tokens = self.transformer_blocks[0](self.embed(x.reshape(len(x), 16, 16)), condition)
        torch._dynamo.graph_break()
        for block in self.transformer_blocks[1:]:
            tokens = block(tokens, condition)
        return tokens.reshape(x.shape)


def make_broken() -> Broken:
    torch.manual_seed(0)
    return Broken().eval()


def test_graphs_of_one_call_share_each_for_itself() -> None:
    found, runtime = run(sharing(), kind=make_broken)
    assert runtime.stats.captures == 2
    assert runtime.stats.shared == 3 * SITES
    assert_replayed(found, runtime, kind=make_broken)


def test_each_generation_measures_for_itself() -> None:
    model, runtime, enter = make(sharing(), cache=CacheConfig(dtype="native", keep_buffers=True))
    kept = []
    for _ in range(2):
        with runtime.generation(STEPS):
            kept.append((guided(model, enter), reasons(runtime, "uncond")))
    (first, before), (second, after) = kept
    assert before == after
    assert "shared" in before
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_latents_in_other_memory_may_be_another_run_unless_the_caller_says_otherwise() -> None:
    model, runtime, enter = make(sharing())
    guided(model, enter, anew=True)
    assert runtime.stats.shared == 0
    assert not runtime.stats.measurements
    with runtime.generation(STEPS):
        found = guided(model, enter, anew=True)
        assert runtime.stats.shared == 3 * SITES
        assert_replayed(found, runtime)


def test_weights_that_change_between_the_branches() -> None:
    model, runtime, enter = make(sharing())

    @contextlib.contextmanager
    def at(step: int, name: str) -> Iterator[None]:
        if (step, name) == (7, "uncond"):
            with torch.no_grad():
                model.transformer_blocks[0].attn1.to_q.weight.mul_(1.0)
        with enter(step, name):
            yield

    found = guided(model, at)
    assert reasons(runtime, "uncond")[4::3] == ["shared", "stale", "stale"]  # what was measured is forgotten, too
    assert_replayed(found, runtime)


def test_buffers_are_freed_when_all_branches_are_done() -> None:
    model, runtime, enter = make(sharing())
    held: list[weakref.ref[Tensor]] = []

    @contextlib.contextmanager
    def at(step: int, name: str) -> Iterator[None]:
        with enter(step, name):
            yield
        if step == STEPS - 2:
            stores = [stored.store for stored in runtime._threads.implicit._stores.values()]
            held.extend(weakref.ref(t) for s in stores for site in range(SITES) for t in s.of(site)[0])

    gc.disable()  # no cycle may keep them
    try:
        guided(model, at)
        assert held
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()
    own = SITES * 2 * 16 * 16 * 4
    assert runtime.stats.cache_bytes == 2 * own  # a loan counts once


def test_guidance_in_one_call_is_left_as_it_is() -> None:
    found, runtime = run(sharing(), order=lambda _: ("cond",))
    plain, static = run(None, order=lambda _: ("cond",))
    assert all(torch.equal(found[key], value) for key, value in plain.items())
    assert runtime.stats.decisions == static.stats.decisions
    assert not runtime.stats.measurements
    assert str(runtime.report()).count("nothing is shared between branches: only one branch was called") == 1


def test_values_in_host_memory_are_not_shared() -> None:
    _, runtime = run(sharing(), cache=CacheConfig(dtype="native", device="cpu"))
    assert runtime.stats.shared == 0
    assert "nothing is shared between branches: what is stored in host memory" in str(runtime.report())


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    ).eval()  # fmt: skip


def prompted(model: nn.Module, enter: Enter) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts = {name: torch.randn(2, 5, 16, generator=generator) for name in PAIR}
    x = torch.randn(2, 4, 8, 8, generator=generator)
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            for name, prompt in prompts.items():
                with enter(step, name):
                    given = {"encoder_hidden_states": prompt, "added_cond_kwargs": {}}
                    found.append(model(x, timestep=timestep(step, STEPS), **given).sample)
            x = x - 0.2 * found[-1]
    return found


def test_keys_and_values_of_the_prompt_are_never_shared() -> None:
    model = dqar_fx.optimize(
        pixart(), SCHEDULE, gates=sharing(), cache=CacheConfig("kv", "native"), backend="eager"
    )  # sites 0 and 2 attend to the image, 1 and 3 to the prompt
    runtime = dqar_fx.runtime(model)
    found = prompted(model, lambda _, name: runtime.branch(name))
    assert [site.lossless for site in runtime.sites] == [False, True, False, True]
    assert {d.site for d in runtime.stats.decisions if d.reason == "shared"} == {0, 2}
    assert {m.site for m in runtime.stats.measurements} == {0, 2}

    decided = {(d.step, d.branch, d.site): d for d in runtime.stats.decisions}
    held: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    at, sites, attend = [(0, "")], [0], F.scaled_dot_product_attention

    def replayed(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (step, name), site = at[0], sites[0]
        sites[0] += 1
        decision = decided[step, name, site]
        if decision.reason == "shared":
            held[name, site] = held["cond", site]
        if decision.action == "reuse":
            key, value = held[name, site]
        held[name, site] = key, value
        return attend(query, key, value, *args, **kwargs)

    @contextlib.contextmanager
    def enter(step: int, name: str) -> Iterator[None]:
        at[0], sites[0] = (step, name), 0
        yield

    with mock.patch.object(F, "scaled_dot_product_attention", replayed):
        expected = prompted(pixart(), enter)
    assert all(map(torch.equal, found, expected))


def code(runtime: dqar_fx.Runtime) -> set[str]:
    return {step.variant.gm.code for step in runtime.graphs[0]._steps.values()}


def test_graphs_are_the_same_but_for_what_compares() -> None:
    _, static = run(None)
    _, shared = run(sharing())
    _, gated = run(sharing(entropy=None, change=ChangeGate(math.inf)))
    more = code(shared) - code(static)
    assert code(shared) - more <= code(static)
    assert more
    assert len(more) <= len(static.graphs[0].pieces)  # those of the one step that was measured
    assert code(gated) == code(shared)
    assert static.graphs[0].comparable == frozenset()
    assert len(static.graphs[0]._stored) == SITES * 2  # a value and a row for each, as ever


def test_one_capture_and_nothing_is_read_from_the_device() -> None:
    model, runtime, enter = make(sharing(0.7, refresh=2))
    scheduled = [torch.tensor([900.0 - 50 * step]) for step in range(STEPS)]
    x, labels = torch.randn(2, 4, 8, 8), {name: torch.tensor(label) for name, label in LABELS.items()}

    def generate() -> None:
        with runtime.generation(STEPS), torch.no_grad():
            for step in range(STEPS):
                runtime.begin_step(step)
                for name in PAIR:
                    with enter(step, name):
                        model(x, timestep=scheduled[step].expand(2), class_labels=labels[name])

    generate()
    assert runtime.stats.captures == 1
    with CountsReads() as mode:
        generate()
    assert mode.reads == 0
    assert runtime.stats.shared > 0
    assert runtime.stats.captures == 1


def test_what_was_shared_is_reported_and_drawn(tmp_path: Any) -> None:
    _, runtime = run(sharing(0.9, refresh=2))
    data, text = runtime.report().to_dict(), str(runtime.report())
    assert data["shared"] == runtime.stats.shared > 0
    assert "shared" not in data["blocked"]
    assert sum(data["blocked"].values()) == data["computed"]
    assert f"taken from another branch at the same step: {data['shared']}" in text
    assert "gates: CrossBranch(0.9, refresh=2)" in text
    assert data["unshared"] == ""
    figure = runtime.stats.plot()
    assert any(label.get_text().startswith("shared") for label in figure.legends[0].get_texts())
    assert runtime.stats.plot(tmp_path / "decisions.png").stat().st_size > 5000


def test_a_controller_does_not_share() -> None:
    with pytest.raises(GateError, match=r"Gates.cross_branch is CrossBranch\(inf.*optimize"):
        dqar_fx.Controller(SCHEDULE, SITES, gates=sharing())


class Named(nn.Module):
    """Attentions that give back a number which says whose call it is: the latents' (run and step) and the branch's."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Mean(), Mean()

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x = x + context[:, -1, None, None] + 0 * timestep.sum()
        return self.attn1(x), self.attn2(x)


EVERY = Schedule.interval(6, every=2, warmup=1)
EVERY_PLAN = EVERY.plan(2)
BASE = 8


@functools.cache
def named() -> tuple[nn.Module, dqar_fx.Runtime]:
    model = dqar_fx.optimize(Named().eval(), EVERY, gates=sharing(), cache=NATIVE, backend="eager")
    return model, dqar_fx.runtime(model)


class SharingInterleavings(Interleavings):
    """Runs that take turns after every call, also between the two of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.runtime = named()

    def call_with(self, run: Run, step: int, branch: int, x: Tensor, contexts: list[Tensor]) -> None:
        t = torch.full((len(x),), 900.0 - 100 * step)
        with torch.no_grad(), self.runtime.branch(PAIR[branch]) if len(contexts) > 1 else contextlib.nullcontext():
            outputs = self.model(x, t, contexts[branch])
        for site, output in enumerate(outputs):
            (value,) = set(output.flatten().tolist())
            number, rest = divmod(int(value), 2 * BASE)
            whose, source = divmod(rest, BASE)
            if number != run.number or not 0 <= source <= step or whose > branch:
                self.wrong.append(f"run {run.number} step {step} branch {branch} site {site}: read {divmod(value, 16)}")
            run.followed.append(source == step - EVERY_PLAN.age[step, site])

    def sampling(self, run: Run, first: int, batch: int, guided: bool) -> Iterator[None]:
        contexts = [torch.tensor([[float(run.number), float(BASE * b)]]).expand(batch, 2) for b in range(1 + guided)]
        with self.runtime.generation(6) if run.explicit else contextlib.nullcontext():
            for step in range(first, 6):
                x = torch.full((batch, 2, 4), float(run.number * 2 * BASE + step))
                for branch in range(len(contexts)):
                    self.call_with(run, step, branch, x, contexts)
                    yield


TestSharingInterleavings = SharingInterleavings.TestCase
TestSharingInterleavings.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_undisturbed_runs_do_share() -> None:
    model, runtime = named()
    x, contexts = torch.zeros(6, 1, 2, 4), [torch.tensor([[0.0, b * float(BASE)]]) for b in range(2)]
    with torch.no_grad():
        for step in range(6):
            for branch, name in enumerate(PAIR):
                with runtime.branch(name):
                    model(x[step] + step, torch.tensor([900.0 - step]), contexts[branch]) if branch else None
    assert runtime.stats.shared == 0
    with torch.no_grad():
        for step in range(6):
            latents = x[step] + step
            for branch, name in enumerate(PAIR):
                with runtime.branch(name):
                    outputs = model(latents, torch.tensor([900.0 - step]), contexts[branch])
            if step in {2, 4}:
                assert {int(v) for v in outputs[0].flatten()} == {step}  # cond's, not 8 more
    assert runtime.stats.shared == 4


def test_compiled_it_shares_as_well_and_compiles_nothing_anew() -> None:
    model = dqar_fx.optimize(Named().eval(), EVERY, gates=sharing(), cache=INT8, fullgraph=True)
    runtime = dqar_fx.runtime(model)
    contexts = [torch.tensor([[0.0, b * float(BASE)]]) for b in range(2)]

    def generate() -> None:
        with torch.no_grad():
            for step in range(6):
                latents = torch.full((1, 2, 4), float(step))
                for branch, name in enumerate(PAIR):
                    with runtime.branch(name):
                        outputs = model(latents, torch.tensor([900.0 - step]), contexts[branch])
                    whose = 0 if step > 1 else branch
                    expected = whose * BASE + (step if step == 0 else step - EVERY_PLAN.age[step, 0])
                    for output in outputs:
                        torch.testing.assert_close(output, torch.full_like(output, expected))

    generate()
    pieces = runtime.stats.variants
    with torch.compiler.set_stance("fail_on_recompile"):
        generate()
    assert runtime.stats.shared == 2 * 2
    assert [m.difference for m in runtime.stats.measurements] == pytest.approx([1.0, 1.0])  # |8 - 0| / |8| at step 0
    assert (runtime.stats.captures, runtime.stats.graph_breaks, runtime.stats.variants) == (1, 0, pieces)


@pytest.mark.parametrize("same_latents", [False, True])
def test_a_call_of_another_run_between_the_two_of_a_step_lends_nothing(same_latents: bool) -> None:
    model, runtime = named()
    runtime.reset()
    mine, others = ([torch.tensor([[n, b * float(BASE)]]) for b in range(2)] for n in (1.0, 2.0))
    with torch.no_grad():
        for step in range(3):
            latents = torch.full((1, 2, 4), 100.0 + step)
            for branch, name in enumerate(PAIR):
                with runtime.branch(name):
                    outputs = model(latents, torch.tensor([900.0 - step]), mine[branch])
                if step == 2 and branch == 0:
                    with runtime.branch(name):  # of a run that begins here, and is abandoned
                        theirs = latents if same_latents else torch.full((1, 2, 4), 500.0)
                        model(theirs, torch.tensor([900.0 - step]), others[branch])
    assert runtime.stats.shared == 0
    assert {int(v) for output in outputs for v in output.flatten()} == {100 + 2 + BASE}  # its own
