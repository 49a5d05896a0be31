"""``calibrate`` from end to end, on the shipped model: what it finds, what it promises, and what it refuses."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, CalibrationError, Plan, PlanError, Schedule, calibrate, digits
from dqar_fx.calibration.budget import Budget
from dqar_fx.calibration.calibrate import Calibration
from dqar_fx.calibration.runs import Loss
from dqar_fx.calibration.solve import Candidate
from tests.models import make_dit
from tests.pipelines.builders import BUILDERS, Request

STEPS, IMAGES = 8, 5
SEEDS = range(3)


class Sampler:
    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        self.seeds: list[int] = []
        self.scheduler = digits.make_scheduler()

    def __call__(self, model: nn.Module, seed: int) -> Tensor:
        self.seeds.append(seed)
        return digits.sample(model, classes=range(IMAGES), seed=seed, num_steps=self.steps, scheduler=self.scheduler)


@pytest.fixture(scope="module")
def calibration() -> Iterator[Calibration]:
    sample, model = Sampler(), digits.load()
    with Calibration(
        model, sample, num_steps=STEPS, seeds=SEEDS, scheduler=sample.scheduler, backend="eager", progress=False
    ) as found:
        yield found
    assert model._compiled_call_impl is None  # as it was


def test_a_plan_saves_what_was_asked_and_is_better_than_a_rule(calibration: Calibration) -> None:
    rule = Schedule.interval(STEPS, every=2, warmup=1).plan(6)
    plan = calibration.choose(f"reuse={rule.reuse_ratio}")
    assert plan.reuse_ratio >= rule.reuse_ratio
    assert plan.calibration is not None
    unseen = range(50, 53)
    assert calibration.measure_plan(plan, unseen).psnr > calibration.measure_plan(rule, unseen).psnr + 2
    # What the coefficients say, before anything ran, is near what real runs show, also at eight coarse steps.
    assert abs(plan.calibration["first_order_psnr"] - plan.calibration["predicted"]["psnr"]) < 4
    assert plan.calibration["verified"]["seeds"] == len(SEEDS)
    assert plan.calibration["speedup_in_flop"] > 1


def test_a_rival_that_is_no_better_is_dropped_after_half_of_the_seeds(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    measure = Calibration.measure

    def watched(self: Calibration, candidate: Candidate, seeds: list[int]) -> Loss:
        asked.append(list(seeds))
        return measure(self, candidate, seeds)

    monkeypatch.setattr(Calibration, "measure", watched)
    rule, always = (
        Candidate(schedule.plan(6).reuse, 0.5, 0.0, "all")
        for schedule in (Schedule.interval(STEPS, every=2), Schedule.always(STEPS))
    )
    assert not calibration._beats(always, rule)
    assert asked == [[0, 1]] * 2  # of the three
    asked.clear()
    assert calibration._beats(rule, always)
    assert asked == [[0, 1]] * 2 + [[0, 1, 2]] * 2
    assert not calibration._beats(rule, rule)  # clearly better, not just as good


@pytest.mark.parametrize("budget", ["psnr=32", "rel_error=0.1"])
def test_a_budget_is_kept_on_unseen_seeds(calibration: Calibration, budget: str) -> None:
    plan = calibration.choose(budget)
    assert plan.calibration is not None
    verified = plan.calibration["verified"]
    unseen = plan.calibration["unseen_seeds"]
    assert not set(unseen) & set(calibration.seeds)
    if budget.startswith("psnr"):
        assert 32 <= verified["psnr"] < 38
    else:
        assert 0.03 < verified["rel_error"] <= 0.1


def test_a_speedup_is_counted_in_flop(calibration: Calibration) -> None:
    plan = calibration.choose("speedup=1.15")
    assert plan.calibration is not None
    assert 1.15 <= plan.calibration["speedup_in_flop"] < 1.25


def test_the_best_of_the_rules_is_a_rule(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_rules_only", True)
    plan = calibration.choose("reuse=0.4")
    rule = Schedule.parse(plan.schedule or "")
    assert rule.plan(6) == plan
    assert rule.name == "taper"  # on this model
    usual = Schedule.interval(STEPS, every=2, warmup=1).plan(6)
    unseen = range(50, 53)
    assert calibration.measure_plan(plan, unseen).psnr > calibration.measure_plan(usual, unseen).psnr


@pytest.mark.parametrize(
    ("budget", "best"),
    [
        ("psnr=500", "even the plan that reuses least"),
        ("speedup=3", "can be reached is 1."),
        ("reuse=0.99", "can be reached is 0."),
    ],
)
def test_what_nothing_can_keep_to_is_refused_with_the_best_there_is(
    calibration: Calibration, budget: str, best: str
) -> None:
    with pytest.raises(CalibrationError, match=best):
        calibration.choose(budget)


@pytest.mark.parametrize(
    "text", ["psnr", "psnr=", "psnr=-1", "psnr=nan", "reuse=1", "speedup=0.5", "fid=3", "rel_error=0"]
)
def test_a_budget_without_a_meaning_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match="give psnr=30"):
        Budget.parse(text)


def test_the_plan_goes_through_a_file_and_is_bound_to_what_it_was_made_for(
    calibration: Calibration, tmp_path: Path
) -> None:
    plan = calibration.plan_of(calibration.candidates()["all"][2])
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan
    assert loaded.calibration == plan.calibration
    model, scheduler = digits.load(), digits.make_scheduler()

    def optimized(**settings: object) -> None:
        dqar_fx.optimize(model, loaded, **{"backend": "eager", "scheduler": scheduler, **settings})
        dqar_fx.restore(model)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized()
    with pytest.warns(UserWarning, match="cache int8:token, not native"):
        optimized(cache=CacheConfig(dtype="native"))
    with pytest.warns(UserWarning, match="scheduler DDIMScheduler"):
        optimized(scheduler=type(scheduler).from_config(scheduler.config, clip_sample=True))
    dqar_fx.optimize(model, loaded, backend="eager", scheduler=scheduler, dynamic=False)  # a size left open fits any
    with pytest.warns(UserWarning, match="calibrated at another size"), torch.no_grad():
        model(torch.zeros(1, 1, 4, 4), timestep=torch.tensor([999]), class_labels=torch.tensor([1]))
    dqar_fx.restore(model)
    with torch.no_grad():
        model.proj_out_2.bias.add_(1)
    with pytest.warns(UserWarning, match="weights"):
        optimized()
    other = nn.Sequential(make_dit())
    with pytest.raises(PlanError, match="calibrated for a DiTTransformer2DModel, and the model is a Sequential"):
        dqar_fx.optimize(other, loaded)


class StoppedError(Exception):
    pass


def test_an_interrupted_calibration_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Stopping(Sampler):
        stops = True

        def __call__(self, model: nn.Module, seed: int) -> Tensor:
            if seed == 2 and self.stops:
                raise StoppedError
            return super().__call__(model, seed)

    model, sample = digits.load(), Stopping(4)
    folder = tmp_path / "records"
    settings = {"num_steps": 4, "seeds": SEEDS, "progress": False}
    with pytest.raises(StoppedError):
        Calibration(model, sample, folder=folder, **settings)
    assert model._compiled_call_impl is None
    first = np.load(folder / "seed-0.npz")["coefficients"]
    (folder / "seed-1.npz").write_bytes(b"half of it")  # as a machine that lost its power leaves it
    sample.stops, sample.seeds = False, []
    resumed = Calibration(model, sample, folder=folder, **settings)
    assert sample.seeds == [0, 1, 2]  # the first one forwards only: is it still the same sampler?
    assert (resumed.coefficients[: len(first)] == first).all()
    assert len(resumed.coefficients) == 3 * len(first)
    with pytest.raises(CalibrationError, match="holds another calibration"):
        Calibration(model, sample, folder=folder, cache=CacheConfig(dtype="int4"), **settings)
    guided = partial(digits.sample, classes=range(IMAGES), num_steps=4, guidance=4.0)
    with pytest.raises(CalibrationError, match="of another sampler"):
        Calibration(model, lambda module, seed: guided(module, seed=seed), folder=folder, **settings)


def test_other_numbers_of_steps_and_too_few_seeds_are_refused() -> None:
    model = digits.load()
    with pytest.raises(CalibrationError, match="called the model at 4 different timesteps, and num_steps is 5"):
        Calibration(model, Sampler(4), num_steps=5, seeds=range(2), progress=False)
    with pytest.raises(CalibrationError, match="at least two"):
        calibrate(model, Sampler(4), seeds=[0])
    with pytest.raises(CalibrationError, match="Beside a module"):
        calibrate(model, {"prompt": "x"})
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("name", ["dit", "wan"])  # with a VAE, whose decoding is left out; and without, of video
def test_a_pipeline_takes_the_place_of_both(name: str) -> None:
    pipe, arguments = BUILDERS[name](Request())
    arguments = {k: v for k, v in arguments.items() if k not in ("generator", "num_inference_steps")}
    with pytest.warns(UserWarning, match="random projections"):
        plan = calibrate(
            pipe, arguments, budget="reuse=0.4", num_steps=4, seeds=range(2), backend="eager", progress=False
        )
    assert plan.reuse_ratio >= 0.4
    assert plan.calibration is not None
    assert plan.calibration["for"]["model"] == type(pipe.transformer).__name__
    assert plan.calibration["for"]["scheduler"].startswith(type(pipe.scheduler).__name__)
