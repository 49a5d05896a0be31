"""The learned policy: what it is told, what it computes, how it is saved, and what it learns."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dqar_fx import ChangeGate, Controller, EntropyGate, GateError, Gates, Policy, PolicyError, Schedule
from dqar_fx.gates import Candidate, Measurement
from dqar_fx.policy import ALL_FEATURES, FEATURES, PolicyGate, feature
from dqar_fx.policy_training import plot_calibration
from dqar_fx.traces import Trace, TraceFile, Traces, load

RNG = np.random.default_rng(0)


def network(features: int = 5, hidden: tuple[int, ...] = (32, 32), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = (features, *hidden)
    layers: list[nn.Module] = []
    for i, width in enumerate(hidden):
        layers += [nn.Linear(widths[i], width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1), nn.Sigmoid()).double().requires_grad_(False)


def make_policy(**settings: Any) -> Policy:
    features = settings.get("features", FEATURES)
    linear = [layer for layer in network(len(features)) if isinstance(layer, nn.Linear)]
    arguments = {
        "weights": tuple(layer.weight.numpy() for layer in linear),
        "biases": tuple(layer.bias.numpy() for layer in linear),
        "mean": np.linspace(-1, 1, len(features)), "std": np.linspace(0.5, 2, len(features)),
        "low": np.full(len(features), -3.0), "high": np.full(len(features), 3.0),
    }  # fmt: skip
    return Policy(**{**arguments, **settings})


def constant(probability: float, **settings: Any) -> Policy:
    """A policy of the default features that always says the same."""
    odds = math.log(probability / (1 - probability))
    return Policy(
        weights=(np.zeros((1, 5)),), biases=(np.array([odds]),), mean=np.zeros(5), std=np.ones(5), low=np.zeros(5),
        high=np.ones(5), **settings,
    )  # fmt: skip


class TestFeatures:
    def test_they_are_those_of_the_formulas(self) -> None:
        for _ in range(20):
            entropy, snr, norm = RNG.uniform(0.1, 1), 10 ** RNG.uniform(-5, 5), RNG.uniform(0.1, 200)
            step, tokens = int(RNG.integers(0, 50)), int(RNG.integers(1, 300))
            candidate = Candidate(
                step=step, num_steps=50, snr=snr, latent_norm=norm, prompt_length=tokens, measured=Measurement(entropy)
            )
            expected = [entropy, np.log(snr), np.log(norm), step / 50, min(tokens, 128) / 128]
            assert [feature(name, candidate) for name in FEATURES] == pytest.approx(expected, rel=1e-12)

    def test_an_entropy_in_nats_is_divided_by_that_of_uniform_attention(self) -> None:
        candidate = Candidate(measured=Measurement(2.0), entropy_bound=math.log(256))
        assert feature("entropy", candidate, in_nats=True) == pytest.approx(2.0 / math.log(256), rel=1e-12)
        assert math.isnan(feature("entropy", Candidate(measured=Measurement(2.0)), in_nats=True))  # keys not known

    def test_pure_noise_and_no_noise_have_a_logarithm_too(self) -> None:
        assert feature("log_snr", Candidate(snr=0.0)) == pytest.approx(math.log(1e-6))
        assert feature("log_snr", Candidate(snr=math.inf)) == pytest.approx(math.log(1e6))

    def test_what_is_not_known_is_nan_and_no_prompt_is_zero(self) -> None:
        assert [math.isnan(feature(name, Candidate())) for name in FEATURES] == [True, True, True, False, False]
        assert feature("prompt", Candidate()) == 0
        assert math.isnan(feature("log_norm", Candidate(latent_norm=0.0)))

    def test_the_others_by_name(self) -> None:
        candidate = Candidate(
            step=7, site=3, num_sites=5, age=2, reuses=1, measured=Measurement(change=0.25), num_steps=10
        )
        found = {name: feature(name, candidate) for name in ("age", "reuses", "depth", "change", "step", "site")}
        assert found == {"age": 2, "reuses": 1, "depth": 0.75, "change": 0.25, "step": 7, "site": 3}


class TestNetwork:
    @pytest.mark.parametrize("hidden", [(32, 32), (7,), (3, 5, 2)])
    def test_it_is_that_of_torch(self, hidden: tuple[int, ...]) -> None:
        reference = network(hidden=hidden)
        linear = [layer for layer in reference if isinstance(layer, nn.Linear)]
        policy = make_policy(
            weights=tuple(layer.weight.numpy() for layer in linear),
            biases=tuple(layer.bias.numpy() for layer in linear),
        )
        rows = RNG.normal(0, 2, (40, 5))
        standard = (np.clip(rows, policy.low, policy.high) - policy.mean) / policy.std
        expected = reference(torch.from_numpy(standard))[:, 0].numpy()
        assert policy.probabilities(rows) == pytest.approx(expected, rel=1e-10)
        assert policy.probability(rows[3].tolist()) == pytest.approx(expected[3])
        assert policy.probability(dict(zip(FEATURES, rows[3], strict=True))) == pytest.approx(expected[3])
        assert policy.hidden == hidden

    def test_the_default_size_is_that_of_the_paper(self) -> None:
        assert make_policy().num_parameters == 1281

    def test_a_value_beyond_what_was_seen_counts_as_the_nearest_that_was(self) -> None:
        policy = make_policy()
        inside, outside = np.full((1, 5), 3.0), np.full((1, 5), 1e6)
        assert policy.probabilities(outside) == policy.probabilities(inside)

    def test_what_is_not_known_gives_no_probability_and_blocks(self) -> None:
        rows = np.zeros((2, 5))
        rows[1, 2] = math.nan
        found = make_policy().probabilities(rows)
        assert not math.isnan(found[0])
        assert math.isnan(found[1])
        assert PolicyGate(constant(0.999)).allow(rows.tolist()) == [True, False]

    def test_odds_beyond_all_measure_do_not_overflow(self) -> None:
        with np.errstate(all="raise"):
            for odds, expected in ((1e4, 1.0), (-1e4, 0.0)):
                policy = make_policy(weights=(np.zeros((1, 5)),), biases=(np.array([odds]),))
                assert policy.probability([0.0] * 5) == expected

    def test_too_many_parameters_are_refused(self) -> None:
        with pytest.raises(PolicyError, match=r"50\d\d\d\d parameters"):
            make_policy(
                weights=(np.zeros((700, 5)), np.zeros((715, 700)), np.zeros((1, 715))),
                biases=(np.zeros(700), np.zeros(715), np.zeros(1)),
            )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mean": np.zeros(4)}, "mean has shape"),
            ({"std": np.zeros(5)}, "std must be positive"),
            ({"low": np.full(5, 4.0)}, "low at most high"),
            ({"biases": (np.zeros(1),)}, "3 weights and 1 biases"),
            ({"weights": (np.zeros((1, 4)),), "biases": (np.zeros(1),)}, "5 values come in"),
            ({"weights": (np.zeros((2, 5)),), "biases": (np.zeros(2),)}, "2 outputs"),
            ({"weights": (np.full((1, 5), np.nan),), "biases": (np.zeros(1),)}, "not finite"),
            ({"features": ("entropy", "colour")}, "unknown: 'colour'"),
            ({"features": ("entropy", "entropy")}, "each once"),
            ({"min_probability": 1.5}, "min_probability is 1.5"),
            ({"min_probability": None}, "min_probability is None"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(PolicyError, match=message):
            make_policy(**settings)

    def test_features_by_name_must_all_be_there(self) -> None:
        with pytest.raises(PolicyError, match="not given log_snr"):
            make_policy().probability({"entropy": 1.0, "log_norm": 0, "progress": 0, "prompt": 0})
        with pytest.raises(PolicyError, match="got 2 features"):
            make_policy().probability([0.0, 1.0])


class TestFiles:
    def test_what_is_saved_is_what_is_loaded(self, tmp_path: Path) -> None:
        policy = make_policy(min_probability=0.7, training={"tau": 0.1})
        path = policy.save(tmp_path / "p.safetensors")
        loaded = Policy.load(path)
        for name, values in policy.tensors().items():
            assert np.array_equal(loaded.tensors()[name], values.astype(np.float32).astype(np.float64))
        assert (loaded.features, loaded.min_probability, loaded.training) == (FEATURES, 0.7, {"tau": 0.1})
        rows = RNG.normal(size=(9, 5))
        assert loaded.probabilities(rows) == pytest.approx(policy.probabilities(rows), abs=1e-6)
        assert Policy.load(path, min_probability=0.2).min_probability == 0.2
        again = loaded.save(tmp_path / "q.safetensors")
        assert again.read_bytes() == path.read_bytes()

    def test_the_json_beside_can_be_read_and_edited(self, tmp_path: Path) -> None:
        path = make_policy().save(tmp_path / "p.safetensors")
        beside = tmp_path / "p.json"
        document = json.loads(beside.read_text())
        assert (document["parameters"], document["hidden"]) == (1281, [32, 32])
        beside.write_text(json.dumps({**document, "min_probability": 0.9}))
        assert Policy.load(path).min_probability == 0.9

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, 'no "format"'),
            ({"version": 2}, "version 2"),
            ({"features": "entropy"}, "not a list of names"),
            ({"features": ["entropy"]}, "1 features"),
            ({"min_probability": "high"}, "min_probability is 'high'"),
        ],
    )
    def test_a_json_that_does_not_fit_is_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = make_policy().save(tmp_path / "p.safetensors")
        beside = tmp_path / "p.json"
        beside.write_text(json.dumps({**json.loads(beside.read_text()), **change}))
        with pytest.raises(PolicyError, match=message) as caught:
            Policy.load(path)
        assert "p.json" in str(caught.value)

    def test_damaged_and_missing_files(self, tmp_path: Path) -> None:
        path = make_policy().save(tmp_path / "p.safetensors")
        whole, beside = path.read_bytes(), (tmp_path / "p.json").read_text()
        path.write_bytes(whole[:200])
        with pytest.raises(PolicyError, match=r"p\.safetensors is not a safetensors file"):
            Policy.load(path)
        path.write_bytes(whole)
        (tmp_path / "p.json").write_text(beside[:40])
        with pytest.raises(PolicyError, match=r"p\.json is not JSON"):
            Policy.load(path)
        (tmp_path / "p.json").unlink()
        with pytest.raises(PolicyError, match=r"p\.json is missing"):
            Policy.load(path)
        with pytest.raises(FileNotFoundError):
            Policy.load(tmp_path / "none.safetensors")
        for use in (Policy.load, make_policy().save):
            with pytest.raises(PolicyError, match=r"ends in \.safetensors"):
                use(tmp_path / "p.pt")

    def test_the_tensors_of_something_else(self, tmp_path: Path) -> None:
        from safetensors.numpy import save

        path = make_policy().save(tmp_path / "p.safetensors")
        path.write_bytes(save({"x": np.zeros(3, np.float32)}))
        with pytest.raises(PolicyError, match="not the tensors of a policy"):
            Policy.load(path)


class TestInGates:
    def test_there_is_none_unless_one_is_given(self) -> None:
        assert Gates().policy is None
        assert not any(isinstance(gate, PolicyGate) for gate in Gates().cascade())
        with pytest.raises(GateError, match=r"Policy\.load\(path\), or None: there is no default"):
            Gates(policy="policy.safetensors")  # type: ignore[arg-type]

    def test_it_is_asked_last(self) -> None:
        gates = Gates(max_age=3, max_reuse=2, change=ChangeGate(0.1), policy=make_policy())
        assert [gate.reason for gate in gates.cascade()] == ["stale", "budget", "snr", "entropy", "change", "policy"]

    def test_it_asks_for_the_measurements_that_it_needs(self) -> None:
        policy = make_policy()
        assert Gates(entropy=None, policy=policy).measures == {"entropy:keys:256"}
        assert Gates(policy=policy).measures == {"entropy:row:256"}  # that of the gate serves both
        assert Gates(entropy=EntropyGate(rows=64, normalize="keys"), policy=policy).measures == {"entropy:keys:64"}
        free = make_policy(features=("progress", "prompt"))
        assert Gates(entropy=None, policy=free).measures == frozenset()
        assert Gates(entropy=None, policy=make_policy(features=("change", "age"))).measures == {"change"}
        assert [Gates(entropy=None, policy=p).asks_for_latents for p in (policy, free)] == [True, False]

    def test_one_that_allows_everything_is_left_out(self) -> None:
        gates = Gates(entropy=None, snr=None, policy=make_policy(min_probability=0))
        assert gates.cascade() == ()
        assert gates.measures == frozenset()

    def test_the_limit_decides(self) -> None:
        candidate = Candidate(snr=1.0, latent_norm=1.0, measured=Measurement(0.5))
        policy = constant(0.6)
        for limit, allowed in ((0.5, True), (0.7, False)):
            gate = PolicyGate(dataclasses.replace(policy, min_probability=limit))
            assert gate.allows(candidate) is allowed
            assert gate.probability(candidate) == pytest.approx(0.6)

    def test_by_hand(self) -> None:
        controller = Controller(Schedule.always(4), 1, gates=Gates(entropy=None, snr=None, policy=constant(0.6)))
        decisions = []
        for step in range(4):
            norm = torch.ones(2) if step > 1 else None
            controller.begin_step(step, snr=1.0, latent_norm=norm)
            decisions.append(controller.should_reuse(0, entropy=0.5))
            if not decisions[-1]:
                controller.commit(0, torch.ones(1, 2))
        assert [d.reason for d in decisions] == ["warmup", "policy", "reuse", "reuse"]
        assert decisions[2].probability == pytest.approx(0.6)
        with pytest.raises(GateError, match=r"got no snr, which Policy\(.*Gates\(policy=None\)"):
            controller.begin_step(0)
        with pytest.raises(GateError, match=r"EntropyGate\(\.\.\., normalize='keys'\)"):
            Controller(Schedule.always(4), 1, gates=Gates(policy=constant(0.6)))


def separable(generations: int = 4, each: int = 120, seed: int = 0) -> Traces:
    """Reads of low entropy late in the run are harmless, the others are not."""
    rng = np.random.default_rng(seed)
    traces = []
    for generation in range(generations):
        for i in range(each):
            values = dict.fromkeys(ALL_FEATURES, 0.0)
            values |= {
                "entropy": rng.uniform(), "progress": rng.uniform(), "log_snr": rng.normal(), "log_norm": rng.normal()
            }  # fmt: skip
            good = values["progress"] - values["entropy"] > 0
            harm = rng.uniform(0.001, 0.009) if good else rng.uniform(0.011, 0.05)
            row = tuple(values[name] for name in ALL_FEATURES)
            traces.append(Trace(generation, i, 0, 1, row, site_error=rng.uniform(), final_error=harm))
    return Traces.of(traces)


class TestTraining:
    def test_it_learns_a_separable_rule(self) -> None:
        policy = Policy.train(separable(), threshold=0.01, epochs=400, patience=60)
        assert policy.training["harmless_allowed"] > 0.9
        assert policy.training["harmful_allowed"] < 0.1
        assert policy.training["held_out_loss"] < 0.3 * policy.training["constant_loss"]
        low, high = ({"entropy": e, "progress": p, "log_snr": 0, "log_norm": 0, "prompt": 0} for e, p in
                     ((0.1, 0.9), (0.9, 0.1)))  # fmt: skip
        assert policy.probability(low) > 0.95
        assert policy.probability(high) < 0.05
        assert policy.probability({**low, "prompt": 1.0}) == policy.probability(low)  # it has never seen a prompt

    def test_the_same_seed_gives_the_same_policy_and_leaves_that_of_the_caller(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        first, again, other = (Policy.train(separable(), epochs=30, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(torch.rand(1), expected)
        for name, values in first.tensors().items():
            assert np.array_equal(again.tensors()[name], values)
        assert not np.array_equal(other.weights[0], first.weights[0])
        assert first.training == again.training

    def test_settings_are_kept(self, tmp_path: Path) -> None:
        policy = Policy.train(
            separable(), hidden=(4,), features=("progress", "entropy"), epochs=20, min_probability=0.3
        )
        assert (policy.hidden, policy.features, policy.min_probability) == ((4,), ("progress", "entropy"), 0.3)
        loaded = Policy.load(policy.save(tmp_path / "p.safetensors"))
        assert loaded.training == policy.training
        assert loaded.training["generations"]["held_out"] != []
        assert len(separable()) - 120 == loaded.training["candidates"]["learned"]  # whole generations are held out

    def test_a_harmful_read_weighs_as_its_harm(self) -> None:
        """Where nothing tells reads apart, ``p`` is the share of weight that is harmless."""
        traces = [
            Trace(g, i, 0, 1, (0.0,) * len(ALL_FEATURES), final_error=0.01 if i % 2 else 0.05)
            for g in range(3)
            for i in range(20)
        ]
        policy = Policy.train(Traces.of(traces), threshold=0.01, epochs=600)
        assert policy.probability([0.0] * 5) == pytest.approx(1 / (1 + 5), abs=0.01)  # one weighs 1, the other 5

    def test_what_counts_as_harm(self) -> None:
        traces = separable()
        final, site = (Policy.train(traces, harm=harm, epochs=60) for harm in ("final", "site"))
        assert final.training["rank_correlation"] > 0.5
        assert abs(site.training["rank_correlation"]) < 0.3  # noise, in these traces
        low = Policy.train(traces, harmless=0.2, epochs=20).training["tau"]
        assert low == pytest.approx(float(np.quantile(traces.final_error, 0.2)), rel=0.2)

    def test_the_calibration_is_drawn(self, tmp_path: Path) -> None:
        policy = Policy.train(separable(), epochs=40)
        bins = policy.training["calibration"]
        assert sum(b["count"] for b in bins) == policy.training["candidates"]["held_out"]
        assert plot_calibration(policy, tmp_path / "c.png").stat().st_size > 5000
        with pytest.raises(PolicyError, match="does not know of its training"):
            plot_calibration(make_policy(), tmp_path / "c.png")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"features": ("hue",)}, "unknown: 'hue'"),
            ({"hidden": (0,)}, "sizes of the hidden layers"),
            ({"hidden": (700, 715)}, "Stay below 500000"),
            ({"harm": "feelings"}, "harm is 'feelings'"),
            ({"harmless": 1.0}, "harmless is 1.0"),
            ({"held_out": 0.0}, "held_out is 0.0"),
            ({"threshold": -1.0}, "threshold is -1.0"),
            ({"threshold": 9.0}, "are harmless at a limit"),
            ({"epochs": 0}, "must be positive"),
            ({"features": ("change",)}, None),
        ],
    )
    def test_settings_out_of_range_are_refused(self, settings: dict[str, Any], message: str | None) -> None:
        if message is None:
            Policy.train(separable(), epochs=2, **settings)
            return
        with pytest.raises(PolicyError, match=message):
            Policy.train(separable(), **settings)

    def test_one_generation_is_not_enough(self) -> None:
        with pytest.raises(PolicyError, match=r"1 generations have measured candidates.*trace more seeds"):
            Policy.train(separable(generations=1))


class TestTraceFiles:
    settings: dict[str, Any] = {"model": "digits", "cache": "int8:token"}  # noqa: RUF012  # never written to
    trace = Trace(0, 2, 1, 1, (math.nan, *(0.5,) * (len(ALL_FEATURES) - 1)), 0.1, math.nan)

    def test_what_is_appended_is_read_and_the_last_of_one_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "made" / "t.jsonl"
        file = TraceFile(path, self.settings)
        file.append([self.trace])
        measured = dataclasses.replace(self.trace, final_error=0.02)
        TraceFile(path, self.settings).append([measured])  # another run
        again = TraceFile(path, self.settings)
        assert list(again.known) == [(0, 2, 1, 1)]
        traces = load(path)
        assert len(traces) == 1
        assert traces.final_error.tolist() == [0.02]
        assert math.isnan(traces.column("entropy")[0])
        assert traces.column("age").tolist() == [0.5]
        assert traces.header["model"] == "digits"

    def test_half_a_line_is_forgotten(self, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        TraceFile(path, self.settings).append([self.trace, dataclasses.replace(self.trace, step=3)])
        path.write_text(path.read_text()[:-9])
        assert [place[1] for place in TraceFile(path, self.settings).known] == [2]
        assert len(load(path)) == 1

    def test_other_settings_and_other_models_are_refused(self, tmp_path: Path) -> None:
        TraceFile(tmp_path / "a.jsonl", self.settings)
        TraceFile(tmp_path / "b.jsonl", {**self.settings, "model": "dit"})
        with pytest.raises(PolicyError, match=r"begun with other settings \(cache: 'int8:token'\)"):
            TraceFile(tmp_path / "a.jsonl", {**self.settings, "cache": "native"})
        with pytest.raises(PolicyError, match=r"do not belong together: their model is 'dit' and 'digits'"):
            load([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])

    @pytest.mark.parametrize(
        ("line", "message"),
        [("{}", "line 2 is no trace"), ("]", "line 2 is no trace"), ('{"features": [1]}', "line 2 is no trace")],
    )
    def test_damaged_lines_are_named(self, line: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        TraceFile(path, self.settings)
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(PolicyError, match=message):
            load(path)

    def test_something_else_is_no_file_of_traces(self, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        for text in ("", "hello\n", '{"format": "x"}\n'):
            path.write_text(text)
            with pytest.raises(PolicyError, match="not a file of traces"):
                load(path)
        with pytest.raises(PolicyError, match="no file of traces"):
            load([])
        with pytest.raises(PolicyError, match=r"none\.jsonl cannot be read \(No such file"):
            load(tmp_path / "none.jsonl")
