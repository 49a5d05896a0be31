"""Gates inside compiled graphs: what they block, what they measure, and what they leave as it was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, ChangeGate, EntropyGate, GateError, Gates, Policy, Schedule, SnrGate
from dqar_fx.graph.specialise import MEASURING
from dqar_fx.policy import FEATURES
from tests.counting import CountsReads
from tests.models import make_dit, sample, timestep

STEPS = 8
SCHEDULE = Schedule.interval(STEPS, every=3, warmup=2)
#: Below ln 16, the largest entropy of 16 tokens, and above what a random model has.
WIDE, NARROW = 2.772, 0.5
SITES = 3


def run(gates: Gates | None, schedule: Schedule = SCHEDULE, **settings: Any) -> tuple[Tensor, dqar_fx.Runtime]:
    model = dqar_fx.optimize(make_dit(), schedule, gates=gates, **{"backend": "eager", **settings})
    return sample(model, steps=STEPS), dqar_fx.runtime(model)


def reasons(runtime: dqar_fx.Runtime) -> Counter[str]:
    return Counter(d.reason for d in runtime.stats.decisions)


@pytest.mark.parametrize(
    "gates",
    [
        Gates(entropy=EntropyGate(math.inf)),
        Gates(entropy=EntropyGate(100.0)),  # more than ln 16: nothing has to be measured to know
        Gates(entropy=EntropyGate(1.01, normalize="keys")),
        Gates(entropy=None, max_age=STEPS, max_reuse=STEPS, change=ChangeGate(math.inf)),
        Gates(entropy=None, snr=None),
    ],
    ids=["infinite", "beyond ln(keys)", "beyond 1", "no limit", "none"],
)
def test_gates_that_block_nothing_are_the_static_run(gates: Gates) -> None:
    static, plain = run(None)
    gated, runtime = run(gates)
    assert torch.equal(gated, static)
    assert runtime.stats.decisions == plain.stats.decisions
    assert runtime.stats.reused > 0


@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        (Gates(entropy=EntropyGate(NARROW)), "entropy"),
        (Gates(entropy=None, change=ChangeGate(0.0)), "change"),
        (Gates(entropy=None, max_age=1), "stale"),
        (Gates(entropy=None, max_reuse=1), "budget"),
    ],
)
def test_each_gate_blocks_alone_and_says_so(gates: Gates, reason: str) -> None:
    static, plain = run(None)
    gated, runtime = run(gates)
    assert not torch.equal(gated, static)
    blocked = [d for d, p in zip(runtime.stats.decisions, plain.stats.decisions, strict=True) if d.action != p.action]
    assert blocked
    assert {d.reason for d in blocked} == {reason}


def test_a_blocked_value_is_computed_and_its_successor_read() -> None:
    model = dqar_fx.optimize(
        make_dit(), Schedule.always(STEPS), gates=Gates(entropy=None, max_reuse=2), backend="eager"
    )
    replayed = dqar_fx.optimize(
        make_dit(), Schedule.custom(STEPS, lambda t, *_: t % 3 > 0), backend="eager"
    )  # computes at 0, 3 and 6
    assert torch.equal(sample(model, steps=STEPS), sample(replayed, steps=STEPS))
    site = [d.reason for d in dqar_fx.runtime(model).stats.decisions if d.site == 0]
    assert site == ["warmup", "reuse", "reuse", "budget", "reuse", "reuse", "budget", "reuse"]


def test_a_gate_on_the_noise_level_follows_the_scheduler() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    snr = dqar_fx.metrics.snr(scheduler)
    low = float(snr[4])  # inclusive
    model = dqar_fx.optimize(
        make_dit(), Schedule.always(STEPS), gates=Gates(entropy=None, snr=SnrGate(low, deep_snr=float(snr[6]))),
        scheduler=scheduler, backend="eager",
    )  # fmt: skip
    with torch.no_grad():
        for t in scheduler.timesteps:
            model(torch.randn(2, 4, 8, 8), timestep=t.expand(2), class_labels=torch.tensor([1, 2]))
    decided = {(d.step, d.site): d.reason for d in dqar_fx.runtime(model).stats.decisions}
    assert [decided[step, 0] for step in range(STEPS)] == ["warmup", *["snr"] * 3, *["reuse"] * 4]
    assert [decided[step, 2] for step in range(STEPS)] == ["warmup", *["snr"] * 5, *["reuse"] * 2]  # the deepest third


def test_a_gate_on_the_noise_level_needs_a_scheduler() -> None:
    with pytest.raises(GateError, match=r"SnrGate\(1\).*scheduler=pipe.scheduler.*snr=None"):
        dqar_fx.optimize(make_dit(), SCHEDULE, gates=Gates(snr=SnrGate(1.0)))
    _, runtime = run(Gates(entropy=None))  # the default one steps aside, and says so
    assert "snr left out" in str(runtime.report())


def entropies(model: nn.Module, step_of: Callable[[], int]) -> dict[tuple[int, int], float]:
    """What each attention of an eager model has, by step and site."""
    found: dict[tuple[int, int], float] = {}
    attend = F.scaled_dot_product_attention

    def measured(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        site = sum(step == step_of() for step, _ in found)
        scores = (query @ key.transpose(-1, -2)).double() / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        found[step_of(), site] = float(torch.special.entr(weights).sum(-1).mean())
        return attend(query, key, value, attn_mask, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", measured):
        sample(model, steps=STEPS)
    return found


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_is_measured_in_the_graph_is_the_entropy_of_the_attention(backend: str) -> None:
    # Nothing is reused (the limit is too low), so that the eager model sees the same latents.
    _, runtime = run(Gates(entropy=EntropyGate(NARROW)), backend=backend)
    plain = make_dit()
    step = [-1]
    plain.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    expected = entropies(plain, lambda: step[0])
    measured = runtime.stats.measurements
    assert len(measured) >= SITES * 4
    assert {m.site for m in measured} == set(range(SITES))
    for m in measured:
        assert m.entropy == pytest.approx(expected[m.step, m.site], rel=2e-4)
        assert math.isnan(m.change)  # nobody asked


def test_keys_and_values_are_measured_as_outputs_are() -> None:
    gates = Gates(entropy=EntropyGate(NARROW), change=ChangeGate(1.0))  # nothing is reused
    _, outputs = run(gates)
    _, keys_values = run(gates, cache=CacheConfig("kv"))
    entropy = [(m.step, m.site, m.entropy) for m in outputs.stats.measurements]
    assert entropy
    assert [(m.step, m.site, m.entropy) for m in keys_values.stats.measurements] == entropy
    changes = [m.change for m in keys_values.stats.measurements if not math.isnan(m.change)]
    assert changes
    assert changes != [m.change for m in outputs.stats.measurements if not math.isnan(m.change)]


@pytest.mark.parametrize("cache", [CacheConfig(dtype="native"), CacheConfig()], ids=str)
def test_what_is_measured_is_the_change_since_the_value_was_stored(cache: CacheConfig) -> None:
    _, runtime = run(Gates(entropy=None, change=ChangeGate(0.0)), Schedule.always(STEPS), cache=cache)
    plain = make_dit()
    outputs: dict[int, list[Tensor]] = {site: [] for site in range(SITES)}
    for site, block in enumerate(plain.transformer_blocks):
        block.attn1.register_forward_hook(lambda *a, site=site: outputs[site].append(a[-1]))
    sample(plain, steps=STEPS)
    measured = {(m.step, m.site): m.change for m in runtime.stats.measurements}
    assert len(measured) == SITES * (STEPS - 1)  # the last step is read by nobody
    for (step, site), change in measured.items():
        if step == 0:
            assert math.isnan(change)  # nothing was stored before
            continue
        new, old = outputs[site][step], outputs[site][step - 1]
        if cache.dtype == "int8":
            old = dqar_fx.dequantize(*dqar_fx.quantize(old))
        assert change == pytest.approx(float(((new - old).norm(dim=(1, 2)) / new.norm(dim=(1, 2))).mean()), rel=1e-4)


def test_a_limit_in_between_lets_some_sites_reuse() -> None:
    _, blocked = run(Gates(entropy=None, change=ChangeGate(0.0)), Schedule.always(STEPS))
    changes = sorted(m.change for m in blocked.stats.measurements if not math.isnan(m.change))
    median = changes[len(changes) // 2]
    _, runtime = run(Gates(entropy=None, change=ChangeGate(median)), Schedule.always(STEPS))
    counted = reasons(runtime)
    assert counted["reuse"] > 0
    assert counted["change"] > 0


def test_every_sample_has_to_pass_where_that_is_asked() -> None:
    _, blocked = run(Gates(entropy=None, change=ChangeGate(0.0), per_sample=True), Schedule.always(STEPS))
    mean = max(m.change for m in blocked.stats.measurements if not math.isnan(m.change))
    together = Gates(entropy=None, change=ChangeGate(mean * 1.0001))
    apart = Gates(entropy=None, change=ChangeGate(mean * 1.0001), per_sample=True)
    assert run(together, Schedule.always(STEPS))[1].stats.reused > run(apart, Schedule.always(STEPS))[1].stats.reused


def test_a_measurement_decides_two_steps_later() -> None:
    _, runtime = run(Gates(entropy=EntropyGate(WIDE)), Schedule.always(STEPS))
    site = [d.reason for d in runtime.stats.decisions if d.site == 0]
    assert site[:2] == ["warmup", "entropy"]  # of step 0 nothing is known yet at step 1
    assert site[2] == "reuse"


def test_after_a_warm_up_of_two_steps_the_entropy_is_known_at_the_first_reuse() -> None:
    static, plain = run(None)
    gated, runtime = run(Gates(entropy=EntropyGate(WIDE)))
    assert torch.equal(gated, static)
    assert runtime.stats.decisions == plain.stats.decisions
    assert runtime.stats.measurements


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=16,
    ).eval()  # fmt: skip


def prompted(model: nn.Module, tokens: int) -> None:
    mask = (torch.arange(12) < tokens).long().expand(2, 12)
    inputs = {
        "encoder_hidden_states": torch.randn(2, 12, 16), "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    with torch.no_grad():
        for step in range(STEPS):
            model(torch.randn(2, 4, 8, 8), timestep=timestep(step, STEPS), **inputs)


def test_the_limit_grows_with_the_prompt() -> None:
    gates = Gates(entropy=EntropyGate(2.0, base_prompt_length=4))
    reused = {}
    for tokens in (1, 4, 12):
        model = dqar_fx.optimize(pixart(), Schedule.always(STEPS), gates=gates, backend="eager")
        prompted(model, tokens)
        decisions = dqar_fx.runtime(model).stats.decisions
        reused[tokens] = sum(d.action == "reuse" for d in decisions if d.site in (0, 2))  # self-attention, 16 tokens
    # ln 16 = 2.77 is within 2 * sqrt(12 / 4), at most 4, and not within 2 or 1.
    assert reused[1] == reused[4] == 0
    assert reused[12] > 0


def test_masked_keys_do_not_count() -> None:
    gates = Gates(entropy=EntropyGate(1e-6, adaptive=False))
    model = dqar_fx.optimize(pixart(), Schedule.always(STEPS), gates=gates, backend="eager")
    prompted(model, 3)
    cross = [m.entropy for m in dqar_fx.runtime(model).stats.measurements if m.site in (1, 3)]
    assert cross
    assert max(cross) <= math.log(3) + 1e-5


def test_the_length_of_the_prompt_can_be_told() -> None:
    gates = Gates(entropy=EntropyGate(2.0, base_prompt_length=4))
    model = dqar_fx.optimize(make_dit(), Schedule.always(STEPS), gates=gates, backend="eager")
    runtime = dqar_fx.runtime(model)
    for length, reuses in ((4, False), (64, True)):
        with runtime.generation(STEPS, prompt_length=length):
            sample(model, steps=STEPS)
        assert bool(runtime.stats.reused) == reuses
    with pytest.raises(dqar_fx.RuntimeStateError, match="prompt_length=0"):
        runtime.generation(STEPS, prompt_length=0)


def test_branches_are_gated_apart() -> None:
    model = dqar_fx.optimize(
        make_dit(), Schedule.always(STEPS), gates=Gates(entropy=None, max_reuse=1), backend="eager"
    )
    runtime = dqar_fx.runtime(model)
    labels = {name: torch.tensor([i, i]) for i, name in enumerate(("cond", "uncond"))}
    with torch.no_grad():
        for step in range(4):
            for name, label in labels.items():
                if name == "uncond" and step == 2:
                    continue  # guidance is off for a step
                with runtime.branch(name):
                    model(torch.randn(2, 4, 8, 8), timestep=timestep(step, STEPS), class_labels=label)
    by_branch = {
        name: [d.reason for d in runtime.stats.decisions if d.branch == name and d.site == 0] for name in labels
    }
    assert by_branch == {"cond": ["warmup", "reuse", "budget", "reuse"], "uncond": ["warmup", "reuse", "budget"]}


def test_one_capture_no_recompile_and_no_more_pieces_than_outcomes() -> None:
    model = dqar_fx.optimize(
        make_dit(12), Schedule.always(STEPS), gates=Gates(entropy=EntropyGate(WIDE), max_reuse=2), fullgraph=True
    )
    first = sample(model, steps=STEPS)
    runtime = dqar_fx.runtime(model)
    pieces = runtime.stats.variants
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(sample(model, steps=STEPS), first)
    assert (runtime.stats.captures, runtime.stats.graph_breaks) == (1, 0)
    assert runtime.stats.variants == pieces <= 12  # prologue, first block, blocks, epilogue; three outcomes


def test_only_sites_that_may_reuse_measure_and_other_pieces_stay_as_they_are() -> None:
    schedule = Schedule.custom(STEPS, lambda step, site, *_: step > 1 and site == 0)
    _, gated = run(Gates(entropy=EntropyGate(WIDE)), schedule)
    assert {m.site for m in gated.stats.measurements} == {0}
    _, static = run(None, schedule)

    def code(runtime: dqar_fx.Runtime) -> set[str]:
        return {
            step.variant.gm.code
            for key, step in runtime.graphs[0]._steps.items()
            if MEASURING.isdisjoint(key[1])  # type: ignore[index]
        }

    assert code(gated) <= code(static)


def test_a_site_that_cannot_be_measured_computes_and_is_listed() -> None:
    class Linear(nn.Module):
        """Attention written out: no operator whose entropy could be asked for."""

        def __init__(self) -> None:
            super().__init__()
            self.heads = 2
            self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.to_q(x).relu(), self.to_k(x).relu(), self.to_v(x)
            return self.to_out(q @ (k.transpose(-1, -2) @ v))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_attention = Linear()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x + self.linear_attention(x) * timestep.sum()

    torch.manual_seed(0)
    model = dqar_fx.optimize(Model().eval(), Schedule.always(4), gates=Gates(entropy=EntropyGate(1e6)), backend="eager")
    with torch.no_grad():
        for step in range(4):
            model(torch.randn(1, 5, 16), timestep=timestep(step, 4))
    runtime = dqar_fx.runtime(model)
    assert runtime.stats.reused == 0
    assert reasons(runtime)["entropy"] == 3
    assert "entropy cannot be measured at linear_attention" in str(runtime.report())


def test_an_attention_that_is_nan_computes() -> None:
    model = dqar_fx.optimize(
        make_dit(), Schedule.always(STEPS), gates=Gates(entropy=EntropyGate(WIDE)), backend="eager"
    )
    sample(model, steps=STEPS, start=torch.full((2, 4, 8, 8), torch.nan))
    assert dqar_fx.runtime(model).stats.reused == 0


def gated_by_scheduler(device: str, gates: Gates) -> tuple[nn.Module, Callable[[], None]]:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS, device=device)
    model = dqar_fx.optimize(
        make_dit().to(device), Schedule.interval(STEPS, every=2, warmup=2), gates=gates, scheduler=scheduler,
        backend="eager",
    )  # fmt: skip
    latents, labels = torch.randn(2, 4, 8, 8, device=device), torch.tensor([1, 2], device=device)

    def generate() -> None:
        scheduler.set_timesteps(STEPS, device=device)
        with torch.no_grad():
            for t in scheduler.timesteps:
                model(latents, timestep=t.expand(2), class_labels=labels)

    return model, generate


def test_gates_read_nothing_from_the_device() -> None:
    model, generate = gated_by_scheduler("cpu", Gates(entropy=EntropyGate(WIDE), change=ChangeGate(0.5)))
    generate()
    with CountsReads() as mode:
        generate()
    assert mode.reads == 0
    assert dqar_fx.runtime(model).stats.measurements


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_gates_wait_for_nothing() -> None:
    model, generate = gated_by_scheduler("cuda", Gates(entropy=EntropyGate(WIDE), change=ChangeGate(0.5), snr=None))
    generate()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dqar_fx.runtime(model).stats.reused > 0


def test_a_picture_of_the_decisions(tmp_path: Any) -> None:
    _, runtime = run(Gates(entropy=EntropyGate(WIDE), max_reuse=1), Schedule.always(STEPS))
    path = runtime.stats.plot(tmp_path / "decisions.png", title="max_reuse=1")
    assert path.stat().st_size > 5000
    with pytest.raises(dqar_fx.RuntimeStateError, match="nothing to draw"):
        dqar_fx.runtime(dqar_fx.optimize(make_dit(), SCHEDULE, backend="eager")).stats.plot()


def test_gates_as_options_of_the_backend() -> None:
    model = make_dit()
    compiled = torch.compile(
        model,
        backend="dqar_fx",
        options={"schedule": Schedule.always(STEPS), "gates": Gates(entropy=None, max_reuse=1), "backend": "eager"},
    )
    sample(compiled, steps=STEPS)
    assert reasons(dqar_fx.runtime(compiled))["budget"] > 0


def test_something_else_in_the_place_of_gates() -> None:
    with pytest.raises(dqar_fx.RuntimeStateError, match=r"gates is a EntropyGate. Pass a dqar_fx.Gates"):
        dqar_fx.optimize(make_dit(), SCHEDULE, gates=EntropyGate())  # type: ignore[arg-type]


def policy_of(odds: float, **settings: Any) -> Policy:
    """A policy of the default features whose answer is always the same."""
    return Policy(
        weights=(np.zeros((1, 5)),), biases=(np.array([odds]),), mean=np.zeros(5), std=np.ones(5),
        low=np.full(5, -100.0), high=np.full(5, 100.0), **settings,
    )  # fmt: skip


def run_with_policy(
    gates: Gates | None, schedule: Schedule = SCHEDULE, steps: int = STEPS, **settings: Any
) -> tuple[Tensor, dqar_fx.Runtime]:
    """As ``run``, by a scheduler, so that the noise level is known."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    # Not dynamic: after tests of other sizes Dynamo would leave this one open, and ln(keys) would not be known.
    settings = {"backend": "eager", "scheduler": scheduler, "dynamic": False, **settings}
    model = dqar_fx.optimize(make_dit(), schedule, gates=gates, **settings)
    x, labels, found = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2]), []
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = model(x, timestep=t.expand(2), class_labels=labels).sample
            x = x - 0.2 * noise
            found.append(x)
    return torch.stack(found), dqar_fx.runtime(model)


class Asked:
    """Stands in for a policy: allows everything, and keeps what it was asked."""

    min_probability = 0.5

    def __init__(self, *features: str) -> None:
        self.features = features or FEATURES
        self.rows: list[Any] = []

    def probabilities(self, rows: Any) -> Any:
        self.rows.append(rows)
        return np.ones(len(rows))


def test_a_policy_that_allows_everything_is_the_static_run() -> None:
    static, plain = run_with_policy(None)
    gated, runtime = run_with_policy(Gates(entropy=None, snr=None, policy=policy_of(3.0)))
    assert torch.equal(gated, static)
    assert runtime.stats.decisions == plain.stats.decisions
    assert runtime.stats.reused > 0


def test_a_policy_blocks_alone_and_says_so() -> None:
    static, plain = run_with_policy(None)
    gated, runtime = run_with_policy(Gates(entropy=None, snr=None, policy=policy_of(-3.0)))
    assert not torch.equal(gated, static)
    assert runtime.stats.reused == 0
    assert Counter(d.reason for d in runtime.stats.decisions)["policy"] > 0
    blocked = {
        d.reason for d, p in zip(runtime.stats.decisions, plain.stats.decisions, strict=True) if d.action != p.action
    }
    assert blocked == {"policy"}
    nothing, _ = run_with_policy(None, Schedule.none(STEPS))
    assert torch.equal(gated, nothing)


def test_a_policy_is_asked_once_a_step_for_what_the_other_gates_let_pass() -> None:
    asked = Asked("step", "site", "age", "reuses")
    gates = Gates(entropy=None, max_reuse=2, policy=asked)
    _, runtime = run_with_policy(gates, Schedule.always(STEPS))
    steps = [set(rows[:, 0].tolist()) for rows in asked.rows]
    assert all(len(step) == 1 for step in steps)
    assert len({step.pop() for step in steps}) == len(asked.rows)
    reads = {(d.step, d.site) for d in runtime.stats.decisions if d.action == "reuse"}
    rows = [tuple(row) for rows in asked.rows for row in rows.tolist()]
    assert {(step, site) for step, site, _, _ in rows} == reads
    assert {(age, reuses) for _, _, age, reuses in rows} == {(1, 0), (2, 1)}
    assert reasons(runtime)["budget"] > 0


def test_a_policy_is_told_what_the_reference_says() -> None:
    asked = Asked("step", "site", *FEATURES)
    gates = Gates(entropy=None, snr=None, policy=asked)
    latents, runtime = run_with_policy(gates, Schedule.always(STEPS, warmup=2), cache=CacheConfig(dtype="native"))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    abar = scheduler.alphas_cumprod.double()[scheduler.timesteps].numpy()
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    norms = [float(x.double().flatten(1).norm(dim=1).mean()) for x in (start, *latents)]
    measured = {(m.step, m.site): m.entropy for m in runtime.stats.measurements}
    rows = {(int(row[0]), int(row[1])): row[2:] for rows in asked.rows for row in rows}
    assert len(rows) == SITES * (STEPS - 2)
    for (step, site), (entropy, log_snr, log_norm, progress, prompt) in rows.items():
        assert entropy == measured[max(t for t, s in measured if s == site and t <= step - 2), site]
        assert log_snr == pytest.approx(math.log(abar[step] / (1 - abar[step])), abs=1e-5)
        assert log_norm == pytest.approx(math.log(norms[step - 2]), abs=1e-5)
        assert (progress, prompt) == (step / STEPS, 0)


@pytest.mark.parametrize("gate", [None, EntropyGate(100.0), EntropyGate(100.0, normalize="keys")], ids=str)
def test_a_policy_and_the_gate_on_entropy_share_one_measurement(gate: EntropyGate | None) -> None:
    asked = Asked("step", "site", "entropy")
    _, runtime = run_with_policy(Gates(entropy=gate, snr=None, policy=asked), Schedule.always(STEPS, warmup=3))
    plain = make_dit()
    step = [-1]
    plain.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    found = {(int(s), int(site)): entropy for rows in asked.rows for s, site, entropy in rows.tolist()}
    expected = first_entropies(plain)
    for site in range(SITES):
        assert found[3, site] == pytest.approx(expected[site] / math.log(16), abs=2e-4)
    assert len(runtime.graphs[0].measures) == 1


def first_entropies(model: nn.Module) -> list[float]:
    """Of each attention at step 1 of ``run_with_policy``, in nats a row."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        x = x - 0.2 * model(x, timestep=scheduler.timesteps[0].expand(2), class_labels=labels).sample
    found: list[float] = []
    attend = F.scaled_dot_product_attention

    def measured(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = ((query @ key.transpose(-1, -2)).double() / math.sqrt(query.shape[-1])).softmax(-1)
        found.append(float(torch.special.entr(weights).sum(-1).mean()))
        return attend(query, key, value, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", measured), torch.no_grad():
        model(x, timestep=scheduler.timesteps[1].expand(2), class_labels=labels)
    return found


def test_where_nothing_is_known_yet_a_policy_computes() -> None:
    _, runtime = run_with_policy(Gates(entropy=None, snr=None, policy=policy_of(9.0)), Schedule.always(STEPS))
    assert [d.reason for d in runtime.stats.decisions if d.site == 0][:3] == ["warmup", "policy", "reuse"]
    free = Asked("progress", "prompt")  # ... unless it does not ask for what has to be measured
    _, runtime = run_with_policy(Gates(entropy=None, snr=None, policy=free), Schedule.always(STEPS))
    assert [d.reason for d in runtime.stats.decisions if d.site == 0][:3] == ["warmup", "reuse", "reuse"]
    assert not runtime.stats.measurements


def test_a_policy_that_has_to_be_told_the_noise_level_needs_a_scheduler() -> None:
    with pytest.raises(GateError, match=r"Gates\.policy is Policy\(.*scheduler=pipe.scheduler.*policy=None"):
        dqar_fx.optimize(make_dit(), SCHEDULE, gates=Gates(policy=policy_of(0.0)))
    gates = Gates(entropy=None, policy=Asked("progress", "log_norm"))
    _, runtime = run(gates)
    assert runtime.stats.reused > 0


def test_without_a_policy_nothing_of_it_runs() -> None:
    with mock.patch("dqar_fx.runtime.gating.LatentNorms") as norms:
        _, gated = run_with_policy(Gates(entropy=EntropyGate(WIDE), max_reuse=1))
    assert not norms.called
    assert gated.graphs[0].measures == {"entropy:row:256"}
    _, plain = run_with_policy(None)
    _, free = run_with_policy(Gates(entropy=None, snr=None, policy=Asked("progress")))

    def code(runtime: dqar_fx.Runtime) -> set[str]:
        return {step.variant.gm.code for step in runtime.graphs[0]._steps.values()}

    assert code(free) == code(plain)


def test_a_policy_reads_nothing_from_the_device() -> None:
    gates = Gates(entropy=None, snr=None, policy=policy_of(0.1, min_probability=0.5))
    model, generate = gated_by_scheduler("cpu", gates)
    generate()
    with CountsReads() as mode:
        generate()
    assert mode.reads == 0
    assert dqar_fx.runtime(model).stats.reused > 0


def test_the_norms_of_one_run_do_not_reach_the_next() -> None:
    asked = Asked("step", "log_norm")
    model, generate = gated_by_scheduler("cpu", Gates(entropy=None, snr=None, policy=asked))
    generate()
    first = [rows.tolist() for rows in asked.rows]
    asked.rows.clear()
    generate()
    assert [rows.tolist() for rows in asked.rows] == first
    assert dqar_fx.runtime(model).stats.reused > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_policy_waits_for_nothing() -> None:
    model, generate = gated_by_scheduler("cuda", Gates(entropy=None, snr=None, policy=policy_of(1.0)))
    generate()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dqar_fx.runtime(model).stats.reused > 0
