"""Sites are kept or dropped by what they cost; the machine of these tests takes exactly the time that it is told."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dqar_fx
from dqar_fx import CacheConfig, CaptureError, CrossBranch, Gates, PlanError, RuntimeStateError, Schedule, TuningError
from dqar_fx.errors import DqarError
from dqar_fx.tuning import timing
from dqar_fx.tuning.choice import SiteChoice
from dqar_fx.tuning.timing import Estimate

STEPS = 7
SCHEDULE = Schedule.interval(STEPS, every=3, warmup=1)  # computes at 0, 1 and 4, stores at 1 and 4, reads at the rest
NATIVE = CacheConfig(dtype="native")
TOKENS, PROMPT, WIDTH = 16, 4, 16
#: Milliseconds: of a call of a compiled piece, and of an attention for each key.
PIECE, KEY = 1.0, 0.1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x)[:, None], self.to_k(context)[:, None], self.to_v(context)[:, None]
        return self.to_out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class Block(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.attn1, self.attn2, self.breaks = Attention(), Attention(), breaks

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.attn2(x, prompt)


class Model(nn.Module):
    """Per block a self-attention over 16 tokens and a cross-attention over 4."""

    def __init__(self, blocks: int = 2, *, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(breaks and not i) for i in range(blocks))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = x * (1 + timestep[:, None, None] / 1000)
        for block in self.blocks:
            x = block(x, encoder_hidden_states)
        return x


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def inputs(step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, prompt = torch.randn(2, TOKENS, WIDTH, generator=generator), torch.randn(2, PROMPT, WIDTH, generator=generator)
    return {"x": x, "timestep": torch.full((2,), 900 - 100 * step), "encoder_hidden_states": prompt}


def sample(model: nn.Module) -> Tensor:
    """One generation of a loop of one's own: every prediction."""
    given = inputs()
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            found.append(model(**{**given, "timestep": inputs(step)["timestep"]}))
            given["x"] = given["x"] - 0.1 * found[-1]
    return torch.stack(found)


class Machine:
    """A clock that stands still but for compiled code, and a backend whose code takes the time that it is told."""

    def __init__(self, read: float = 0.0, store: float = 0.0) -> None:
        self.now = 0.0  # seconds
        self.read, self.store = read, store  # milliseconds, of each stored tensor
        self.compiled = 0

    def backend(self, gm: fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        machine, self.compiled = self, self.compiled + 1
        stores = sum(node.target == "copy_" for node in gm.graph.nodes)
        stored = sum(node.op == "placeholder" and node.name.startswith("stored_") for node in gm.graph.nodes)

        class Clocked(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target is F.scaled_dot_product_attention:
                    machine.now += KEY * args[1].shape[-2] / 1e3
                return super().call_function(target, args, kwargs)

        def run(*args: Any) -> Any:
            machine.now += (PIECE + stores * machine.store + (stored - stores) * machine.read) / 1e3
            return Clocked(gm).run(*args)

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    def make(**costs: float) -> Machine:
        made = Machine(**costs)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.now))
        return made

    yield make
    torch._dynamo.reset()


def tune(model: nn.Module, machine: Machine, schedule: Any = SCHEDULE, **settings: Any) -> dqar_fx.Tuning:
    return dqar_fx.tune(
        model, inputs(), schedule=schedule, backend=machine.backend, **{"cache": NATIVE, "rounds": 3, **settings}
    )


def test_costs_and_speed_up_are_those_of_the_machine(machine: Callable[..., Machine]) -> None:
    tuning = tune(Model(), machine(read=0.3, store=0.1))
    # Each block is one piece with both its attentions; what is after the last one needs no piece of its own.
    pieces = round(tuning.step_ms["nothing reused"].median - 2 * (TOKENS + PROMPT) * KEY)
    assert pieces in (2, 3)
    for cost in tuning.costs:
        keys = TOKENS if cost.path.endswith("attn1") else PROMPT
        assert cost.compute_ms - cost.read_ms == pytest.approx(KEY * keys - 0.3)
        assert cost.store_ms == pytest.approx(0.1)
        assert (cost.reads, cost.stores) == (4, 2)
        assert cost.saved_ms.median == pytest.approx(4 * (KEY * keys - 0.3) - 2 * 0.1)
    assert [cost.path for cost in tuning.costs] == [f"blocks.{i}.attn{k}" for i in range(2) for k in (1, 2)]
    whole = PIECE + 2 * KEY * (TOKENS + PROMPT)  # torch.compile makes one piece of everything
    computed, read = pieces * PIECE + 2 * KEY * (TOKENS + PROMPT), pieces * PIECE + 4 * 0.3
    assert tuning.step_ms["torch.compile"].median == pytest.approx(whole)
    assert tuning.step_ms["all reused"].median == pytest.approx(read)
    own = computed + 2 * (computed + 4 * 0.1) + 4 * read
    assert tuning.speedup.median == pytest.approx(STEPS * whole / own)
    assert tuning.schedule_ms.median == pytest.approx(own / STEPS)
    assert tuning.sites.kept == tuple(range(4))
    assert tuning.pays
    assert tuning.rounding_error == 0.0  # a native cache
    assert tuning.cache_bytes == 4 * 2 * TOKENS * WIDTH * 4


def test_equal_blocks_are_compiled_once_and_a_deeper_model_compiles_no_more(machine: Callable[..., Machine]) -> None:
    tune(Model(3), few := machine())
    tune(Model(6), many := machine())
    assert few.compiled == many.compiled <= 17  # one of them torch.compile's


def test_sites_that_do_not_pay_are_dropped_and_keep_their_number(machine: Callable[..., Machine]) -> None:
    # A cross-attention takes 0.4 ms, a self-attention 1.6.
    given = machine(read=0.8)
    tuning = tune(Model(), given)
    assert tuning.sites.kept == (0, 2)
    assert set(tuning.sites.left) == {1, 3}
    plan = SCHEDULE.plan(4)
    model = dqar_fx.optimize(Model(), plan, cache=NATIVE, backend=given.backend, sites=tuning.sites, fullgraph=True)
    runtime = dqar_fx.runtime(model)
    got = sample(model)
    done = {(d.step, d.site): d for d in runtime.stats.decisions}
    assert len(done) == STEPS * 4
    for step, site in itertools.product(range(STEPS), range(4)):
        assert (done[step, site].action == "reuse") == (plan.reuse[step, site] and site % 2 == 0)
        assert done[step, site].reason in ("reuse", "warmup", "schedule", "stale")
    assert runtime.plan is not None
    assert runtime.plan.reuse.mean(axis=0).tolist() == [pytest.approx(4 / 7), 0] * 2
    stored = sum(site["cache_bytes"] for site in runtime.report().to_dict()["sites"])
    assert stored == 2 * 2 * TOKENS * WIDTH * 4  # the others have stored nothing
    # It is the model that reuses the same sites for any other reason.
    mask = plan.reuse.copy()
    mask[:, 1::2] = False
    other = dqar_fx.optimize(Model(), dqar_fx.Plan(mask), cache=NATIVE, backend="eager")
    assert torch.equal(got, sample(other))
    assert not torch.equal(got, sample(Model()))
    # ... and not the one whose sites are numbered anew.
    left = runtime.report().to_dict()["left_computing"]
    assert [site["path"] for site in left] == ["blocks.0.attn2", "blocks.1.attn2"]
    for site in left:
        assert re.fullmatch(r"reuse does not pay here \([\d.]+ ms to compute, [\d.]+ ms to read\)", site["reason"])
    assert "left computing: blocks.1.attn2 (cross): reuse does not pay here" in str(runtime.report())
    runtime.follow(Schedule.always(STEPS))  # another schedule, the same choice
    sample(model)
    assert {d.site for d in runtime.stats.decisions if d.action == "reuse"} == {0, 2}


def test_a_rule_that_goes_by_depth_means_the_same_sites_as_before(machine: Callable[..., Machine]) -> None:
    given = machine(read=0.8)
    schedule = Schedule.linear(STEPS, warmup=1, fraction=1.0)
    model = dqar_fx.optimize(Model(), schedule, cache=NATIVE, backend=given.backend, sites="auto")
    sample(model)
    plan, reused = schedule.plan(4), [d.action == "reuse" for d in dqar_fx.runtime(model).stats.decisions]
    mask = plan.reuse.copy()
    mask[:, 1::2] = False
    assert reused == mask.flatten().tolist()


def test_auto_chooses_once_at_the_first_call_and_runs_what_it_compiled(machine: Callable[..., Machine]) -> None:
    given = machine(read=0.8)
    model = dqar_fx.optimize(Model(), SCHEDULE, cache=NATIVE, backend=given.backend, sites="auto", fullgraph=True)
    runtime = dqar_fx.runtime(model)
    assert given.compiled == 0
    sample(model)
    chosen, compiled = runtime.plan, given.compiled
    assert chosen is not None
    assert (chosen.reuse.any(axis=0) == [True, False] * 2).all()
    assert runtime.stats.captures == 1
    given.read = 0.0  # now all of them would pay
    with torch.compiler.set_stance("fail_on_recompile"):
        sample(model)
    assert (runtime.plan, given.compiled) == (chosen, compiled)
    same = dqar_fx.optimize(
        Model(), SCHEDULE, cache=NATIVE, backend="eager", sites=SiteChoice(4, dict.fromkeys((1, 3), "measured"))
    )
    assert torch.equal(sample(model), sample(same))
    assert dqar_fx.restore(model) is model
    assert torch.equal(sample(model), sample(Model()))


def test_where_nothing_pays_everything_computes_and_somebody_is_told(machine: Callable[..., Machine]) -> None:
    given = machine(read=5.0)
    model = dqar_fx.optimize(Model(), SCHEDULE, cache=NATIVE, backend=given.backend, sites="auto")
    with pytest.warns(UserWarning, match=r"reuse pays at none of the 4 attentions of Model .* ms to compute, .* read"):
        got = sample(model)
    assert torch.equal(got, sample(Model()))
    stats = dqar_fx.runtime(model).stats
    assert (stats.reused, stats.cache_bytes) == (0, 0)
    assert len(dqar_fx.runtime(model).report().to_dict()["left_computing"]) == 4


def test_a_schedule_that_loses_as_a_whole_keeps_no_site(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = machine(read=2.0)
    # As if each site by itself had been lost in noise.
    monkeypatch.setattr("dqar_fx.tuning.result.SiteCost.pays", True)
    tuning = tune(Model(), given)
    assert tuning.sites.kept == ()
    assert not tuning.pays
    assert tuning.speedup.median == pytest.approx(
        tuning.step_ms["torch.compile"].median / tuning.step_ms["nothing reused"].median
    )
    assert all("x as fast as with nothing reused" in why for why in tuning.sites.left.values())


def test_a_loss_within_the_noise_drops_nothing() -> None:
    cost = dqar_fx.tuning.result.SiteCost(
        index=0, path="", kind="self", compute_ms=1.0, read_ms=1.1, store_ms=0.0, reads=1, stores=1,
        saved_ms=Estimate.of([-1.0, -0.5, 0.5, -0.6]),
    )  # fmt: skip
    assert cost.saved_ms.median < 0
    assert cost.pays
    assert not Estimate.of([-1.0, -1.1, -0.9, -1.0]).high >= 0


def test_the_notch_is_that_of_mcgill_tukey_and_larsen() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.median == 3
    assert found.high - found.median == pytest.approx(1.57 * 3.0 / 5**0.5)  # quartiles 1.5 and 4.5
    assert found.median - found.low == pytest.approx(found.high - found.median)
    assert Estimate.of([2.0]) == Estimate(2.0, 2.0, 2.0)


def test_a_schedule_without_reuse_leaves_nothing_to_choose(machine: Callable[..., Machine]) -> None:
    tuning = tune(Model(), machine(read=9.0), Schedule.none(STEPS))
    assert (tuning.costs, tuning.sites.left, tuning.reuse_ratio) == ((), {}, 0.0)
    assert "4 of 4 sites" in str(tuning)


def test_a_model_in_several_graphs_is_measured_and_chosen_from_alike(machine: Callable[..., Machine]) -> None:
    given = machine(read=0.8)
    tuning = tune(Model(breaks=True), given)
    assert tuning.sites.kept == (0, 2)
    model = dqar_fx.optimize(Model(breaks=True), SCHEDULE, cache=NATIVE, backend=given.backend, sites=tuning.sites)
    sample(model), sample(model)
    runtime = dqar_fx.runtime(model)
    assert runtime.stats.graph_breaks == 1
    assert {d.site for d in runtime.stats.decisions if d.action == "reuse"} == {0, 2}
    assert [site["path"] for site in runtime.report().to_dict()["left_computing"]] == [
        runtime.sites[i].path for i in (1, 3)
    ]


def test_what_is_exact_is_read_at_every_step_unless_that_does_not_pay(machine: Callable[..., Machine]) -> None:
    cache = CacheConfig(target="kv", dtype="native")

    def reused(**costs: float) -> dict[int, int]:
        given = machine(**costs)
        model = dqar_fx.optimize(Model(), SCHEDULE, cache=cache, backend=given.backend, sites="auto")
        sample(model)
        decisions = dqar_fx.runtime(model).stats.decisions
        return {site: sum(d.site == site and d.action == "reuse" for d in decisions) for site in range(4)}

    assert reused() == {0: 4, 1: 6, 2: 4, 3: 6}  # it costs and saves nothing: nothing is dropped
    with pytest.warns(UserWarning, match="reuse pays at none"):
        assert set(reused(read=1.0).values()) == {0}


def test_branches_do_not_share_what_was_dropped() -> None:
    model = dqar_fx.optimize(
        Model(), Schedule.none(STEPS), cache=NATIVE, backend="eager",
        gates=Gates(entropy=None, snr=None, cross_branch=CrossBranch(1e9)),
        sites=SiteChoice(4, dict.fromkeys((1, 3), "measured")),
    )  # fmt: skip
    runtime, given = dqar_fx.runtime(model), inputs()
    with torch.no_grad(), runtime.generation(STEPS):
        for step, name in itertools.product(range(STEPS), ("cond", "uncond")):
            runtime.begin_step(step)
            with runtime.branch(name):
                model(**given)
        assert {d.site for d in runtime.stats.decisions if d.reason == "shared"} == {0, 2}


def test_the_model_is_left_as_it_was(machine: Callable[..., Machine]) -> None:
    model, before = Model(), Model()
    attributes = dict(vars(model))
    tune(model, machine())
    assert vars(model) == attributes
    assert model._compiled_call_impl is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert torch.equal(sample(dqar_fx.optimize(model, Schedule.none(STEPS), backend="eager")), sample(before))


@pytest.fixture(scope="module")
def half() -> dqar_fx.Tuning:
    """A tuning in which the self-attentions pay, and the cross-attentions do not."""
    given = Machine(read=0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: given.now))
        return tune(Model(), given)


def test_it_is_saved_and_loaded(half: dqar_fx.Tuning, tmp_path: Path) -> None:
    tuning = half
    path = tuning.save(tmp_path / "tuning.json")
    assert dqar_fx.Tuning.load(path) == tuning
    document = json.loads(path.read_text())
    assert [cost["pays"] for cost in document["costs"]] == [True, False] * 2
    for text, message in (
        ("{}", 'no "format"'),
        ("[", "not a tuning"),
        (json.dumps({**document, "version": 2}), "version 2"),
        (json.dumps({k: v for k, v in document.items() if k != "costs"}), "costs"),
        (json.dumps({**document, "sites": {"num_sites": 1, "left": {"5": "no"}}}), r"sites \[5\]"),
        (json.dumps({**document, "more": 1}), "more"),
    ):
        path.write_text(text)
        with pytest.raises(TuningError, match=message) as error:
            dqar_fx.Tuning.load(path)
        assert str(path) in str(error.value)


def test_the_table_says_what_is_kept(machine: Callable[..., Machine]) -> None:
    said: list[str] = []
    text = str(tune(Model(), machine(read=0.8), progress=said.append))
    assert said == ["compiling", "timing each site", "compiling with torch.compile", "timing whole steps"]
    assert re.search(r"^1 +blocks\.0\.attn2 +cross .* no$", text, re.MULTILINE)
    assert re.search(r"^2 +blocks\.1\.attn1 +self .* yes$", text, re.MULTILINE)
    assert "2 of 4 sites reuse: 28.6% of all attentions" in text


@pytest.mark.parametrize(
    ("given", "settings", "kind", "message"),
    [
        ([torch.zeros(1)], {}, TuningError, "inputs is a list"),
        ({1: torch.zeros(1)}, {}, TuningError, "inputs is a dict"),
        (inputs(), {"rounds": 2}, TuningError, "rounds is 2. Give at least 3"),
        (inputs(), {"schedule": SCHEDULE.plan(5)}, PlanError, "5 sites and 7 steps, but the run has 4"),
        (inputs(), {"schedule": "taper"}, RuntimeStateError, "schedule is a str"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    given: Any, settings: dict[str, Any], kind: type[DqarError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        dqar_fx.tune(Model(), given, **{"backend": "eager", **settings})


def test_models_that_are_compiled_or_have_no_attention_are_refused() -> None:
    model = Model()
    model.compile(backend="eager")
    with pytest.raises(RuntimeStateError, match="compiled in place"):
        dqar_fx.tune(model, inputs())
    with pytest.raises(CaptureError, match="no attention was found"):
        dqar_fx.tune(Plain(), (torch.zeros(1, 2),), backend="eager")
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(UserWarning, match="ran eager"),
        pytest.raises(TuningError, match="ran outside of its compiled graphs"),
    ):
        dqar_fx.tune(Model(), inputs(), backend="eager")


def test_a_choice_for_another_model_is_refused_before_it_runs() -> None:
    model = dqar_fx.optimize(Model(), SCHEDULE, backend="eager", sites=SiteChoice(8, {1: "measured"}))
    with pytest.raises(TuningError, match="8 sites, and this one has 4"):
        sample(model)


def test_a_backend_cannot_tune() -> None:
    compiled = torch.compile(Model(), backend="dqar_fx", options={"schedule": SCHEDULE, "sites": "auto"})
    with torch.no_grad(), pytest.raises(Exception, match=r"tune\(model, inputs\)\.sites"):
        compiled(**inputs())


def test_a_first_call_that_runs_eager_puts_the_choice_off(machine: Callable[..., Machine]) -> None:
    given = machine(read=0.8)
    model = dqar_fx.optimize(Model(), SCHEDULE, cache=NATIVE, backend=given.backend, sites="auto")
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="ran eager"), torch.no_grad():
        model(**inputs())
    sample(model)
    assert {d.site for d in dqar_fx.runtime(model).stats.decisions if d.action == "reuse"} == {0, 2}
