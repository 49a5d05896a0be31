"""What a sweep says of each reuse, against differences of real runs of the eager model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqar_fx import CacheConfig
from dqar_fx.backend import make_runtime
from dqar_fx.calibration.sweep import Sweep
from dqar_fx.calibration.taps import TappedModel
from dqar_fx.errors import CalibrationError
from dqar_fx.schedule import Schedule
from tests.models import make_dit, timestep

STEPS, SITES, BATCH, MAX_AGE = 4, 3, 2, 2
Sampler = Callable[[nn.Module, int], Tensor]


@torch.no_grad()
def batched(model: nn.Module, seed: int) -> Tensor:
    """Guidance in one call of twice the batch."""
    x = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.tensor([1, 2, 10, 10])
    for step in range(STEPS):
        both = model(torch.cat([x, x]), timestep=timestep(step, STEPS, 4), class_labels=labels).sample[:, :4]
        cond, null = both.chunk(2)
        x = x - 0.2 * (null + 2 * (cond - null))
    return x.clamp(-3, 3)


@torch.no_grad()
def in_turn(model: nn.Module, seed: int) -> Tensor:
    """Guidance in two calls, and a sampler that writes into its latents."""
    x = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for step in range(STEPS):
        t = timestep(step, STEPS, BATCH)
        cond = model(x, timestep=t, class_labels=torch.tensor([1, 2])).sample[:, :4]
        null = model(x, t, torch.tensor([10, 10])).sample[:, :4]
        x = x.clone()
        x.sub_(0.2 * (null + 2 * (cond - null)))
    return x


def make_double() -> nn.Module:
    return make_dit(SITES).double()


def sweep_of(model: nn.Module, sample: Sampler, cache: CacheConfig | None = None) -> Sweep:
    cache = CacheConfig(dtype="native") if cache is None else cache
    runtime = make_runtime(schedule=Schedule.none(STEPS), cache=cache, backend="eager")
    runtime.latents = "hidden_states"
    return Sweep(model, TappedModel(model, runtime), sample, ("timestep", 1), ("hidden_states", 0), MAX_AGE)


@contextlib.contextmanager
def handing_on(model: nn.Module, change: Callable[[int, int, Tensor], Tensor]) -> Iterator[None]:
    """The eager model, whose attentions hand on ``change(call, site, value)``."""
    call = [-1]
    hooks = [model.register_forward_pre_hook(lambda *_: call.__setitem__(0, call[0] + 1))]
    for site, module in enumerate(m for m in model.modules() if type(m).__name__ == "Attention"):
        hooks.append(module.register_forward_hook(lambda _m, _a, out, site=site: change(call[0], site, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def derivative(model: nn.Module, sample: Sampler, step: int, site: int, age: int, calls: int) -> Tensor:
    """The error of the final sample for one reuse, from a small piece of the way; other sites of the step are fixed."""
    values: dict[tuple[int, int], Tensor] = {}

    def note(call: int, at: int, value: Tensor) -> Tensor:
        values[call, at] = value
        return value

    with handing_on(model, note):
        final = sample(model, 0)
    small = 1e-5

    def nudge(call: int, at: int, value: Tensor) -> Tensor:
        if call // calls != step:
            return value
        fresh = values[call, at]
        stored = values[call - age * calls, at]
        return fresh + small * (stored - fresh) if at == site else fresh

    with handing_on(model, nudge):
        return (sample(model, 0) - final) / small


@pytest.mark.parametrize(("sample", "calls"), [(batched, 1), (in_turn, 2)])
def test_coefficients_are_the_projected_derivatives_of_each_sample(sample: Sampler, calls: int) -> None:
    model = make_double()
    sweep = sweep_of(model, sample)
    final = sweep.forwards(0)
    assert torch.equal(final, sample(model, 0))  # looking changes nothing
    assert (sweep.num_steps, sweep.num_calls) == (STEPS, STEPS * calls)
    found = sweep.backwards(torch.Generator().manual_seed(5))
    assert found.shape == (BATCH, STEPS, SITES, MAX_AGE + 1)
    weights = torch.randn(final.shape, generator=torch.Generator().manual_seed(5)).double()
    for step, site, age in ((1, 0, 1), (2, 1, 2), (3, 2, 1), (3, 0, 2)):
        error = derivative(model, sample, step, site, age, calls)
        expected = (weights * error).flatten(1).sum(1) / error[0].numel() ** 0.5
        # The products are taken in float32; what is left of them is a difference.
        assert torch.allclose(torch.tensor(found[:, step, site, age]), expected, rtol=2e-2, atol=1e-6)


def test_an_age_that_a_step_cannot_have_costs_nothing_and_the_sampler_keeps_no_trace() -> None:
    model = make_double()
    sweep = sweep_of(model, batched)
    sweep.forwards(0)
    found = sweep.backwards(torch.Generator().manual_seed(1))
    assert not found[:, 0].any()
    assert not found[:, 1, :, 2].any()
    assert found[:, 2:, :, 1:].all()
    assert model._compiled_call_impl is None
    assert not any(p.grad is not None for p in model.parameters())


def test_what_quantisation_adds_is_part_of_it() -> None:
    model = make_double()
    rows = []
    for cache in (CacheConfig(dtype="native"), CacheConfig()):
        sweep = sweep_of(model, batched, cache)
        sweep.forwards(0)
        rows.append(torch.tensor(sweep.backwards(torch.Generator().manual_seed(1))))
    assert 0 < (rows[1] - rows[0]).norm() < rows[0].norm() / 10


def through_numpy(model: nn.Module, seed: int) -> Tensor:
    return torch.from_numpy(batched(model, seed).numpy())


def with_inference_mode(model: nn.Module, seed: int) -> Tensor:
    with torch.inference_mode():
        return batched(model, seed)


def calls_nothing(_model: nn.Module, _seed: int) -> Tensor:
    return torch.zeros(1, 4, 8, 8)


def returns_a_list(model: nn.Module, seed: int) -> Any:
    return [batched(model, seed)]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (through_numpy, "no .numpy"),
        (with_inference_mode, "torch.inference_mode"),
        (calls_nothing, "did not call the DiTTransformer2DModel"),
        (returns_a_list, "returned a list"),
    ],
)
def test_a_sampler_that_cannot_be_swept_says_why(sample: Sampler, message: str) -> None:
    model = make_double()
    with pytest.raises(CalibrationError, match=message):
        sweep_of(model, sample).forwards(0)
    assert model._compiled_call_impl is None
