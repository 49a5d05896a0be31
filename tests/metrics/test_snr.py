"""The SNR of every scheduler that diffusers has, against what the scheduler does to a signal and to noise."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dqar_fx.errors import DqarError
from dqar_fx.metrics import MetricError, latent_norm, prediction_snr, snr
from tests.metrics.schedulers import make, measured, scheduler_classes, variants

# Some diffusers schedulers hand tensors to numpy functions in a way that numpy will drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

CLASSES = {kind.__name__: kind for kind in scheduler_classes()}
#: No Gaussian noise is added (tokens), or nothing but a step function tells how much (deprecated ones).
NO_LEVELS = {
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "KarrasVeScheduler",
    "ScoreSdeVpScheduler",
    "VQDiffusionScheduler",
}
#: ``add_noise`` is missing, raises, or (SASolver) goes by the timestep rather than by its sigmas; tested further below.
NOT_BY_ADD_NOISE = {
    "ConsistencyDecoderScheduler",
    "DDIMInverseScheduler",
    "HeliosScheduler",
    "IPNDMScheduler",
    "LTXEulerAncestralRFScheduler",
    "PiflowScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
}
#: Every second call is at a sigma of its own, at which ``add_noise`` adds no noise.
TWO_SIGMAS = {"DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
#: These add noise in float32 whatever they are given; the rest agrees to 1e-9.
RTOL = {"DDPMWuerstchenScheduler": 2e-4, "FlowMatchHeunDiscreteScheduler": 1e-6, "HeliosDMDScheduler": 1e-6}


def power_ratio(scheduler: Any, signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return (signal * getattr(scheduler.config, "sigma_data", 1.0) / noise) ** 2


def breaks(kind: str, variant: dict[str, Any]) -> bool:
    """Configurations that diffusers takes although they make no noise levels."""
    flow_of_karras = variant.get("use_flow_sigmas", False) and variant.get("use_karras_sigmas", False)
    return flow_of_karras and kind != "UniPCMultistepScheduler"  # which alone turns the sigmas into those of a flow


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - NO_LEVELS - NOT_BY_ADD_NOISE))
def test_it_is_what_add_noise_does(name: str) -> None:
    compared = 0
    for variant in variants(CLASSES[name]):
        scheduler = make(CLASSES[name], variant)
        if scheduler is None:
            continue
        if breaks(name, variant):
            with pytest.raises(MetricError, match=name):
                snr(scheduler)
            continue
        result = snr(scheduler)
        assert result.dtype == np.float64
        assert result.shape == (len(scheduler.timesteps),)
        expected = power_ratio(scheduler, *measured(scheduler))
        here = slice(None, None, 2 if name in TWO_SIGMAS else 1)
        np.testing.assert_allclose(
            result[here], expected[here], rtol=RTOL.get(name, 1e-9), atol=1e-30, err_msg=f"{name} {variant}"
        )
        compared += 1
    assert compared


@pytest.mark.parametrize("name", sorted(NO_LEVELS))
def test_without_noise_levels_it_refuses(name: str) -> None:
    with pytest.raises(MetricError, match=f"{name} tells no noise levels"):
        snr(make(CLASSES[name], {}))


DISCRETE = [f"{n}DiscreteScheduler" for n in ("Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral", "LMS")]


@pytest.mark.parametrize("name", [*DISCRETE, "DPMSolverSDEScheduler", "EDMEulerScheduler"])
@pytest.mark.parametrize("karras", [False, True])
def test_in_the_loop_the_input_is_scaled_by_it(name: str, karras: bool) -> None:
    """These divide the network's input by its standard deviation, ``sqrt(sigma_data^2 + sigma^2)``, call by call."""
    if karras and not any("use_karras_sigmas" in v for v in variants(CLASSES[name])):
        pytest.skip("has no Karras sigmas")
    scheduler = make(CLASSES[name], {"use_karras_sigmas": True} if karras else {})
    result = snr(scheduler)
    scheduler.noise_sampler = lambda *_: torch.zeros(1)  # the SDE's needs torchsde
    sigma_data, variances = getattr(scheduler.config, "sigma_data", 1.0), []
    for timestep in scheduler.timesteps:
        scale = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep).item()
        variances.append(1 / scale**2 - sigma_data**2)
        scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    np.testing.assert_allclose(sigma_data**2 / result, variances, rtol=1e-5, atol=3e-7)  # float32 scales


@pytest.mark.parametrize("variant", list(variants(CLASSES["SASolverScheduler"])), ids=str)
def test_the_sa_solver_predicts_with_it(variant: dict[str, Any]) -> None:
    if breaks("SASolverScheduler", variant):
        pytest.skip("refused: see above")
    scheduler = make(CLASSES["SASolverScheduler"], variant | {"prediction_type": "epsilon"})
    result, one, zero = snr(scheduler), torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for position, expected in enumerate(result):
        scheduler._step_index = position
        inverse_signal = scheduler.convert_model_output(zero, sample=one).item()
        noise_over_signal = -scheduler.convert_model_output(one, sample=zero).item()
        assert inverse_signal >= 1
        assert expected == pytest.approx(1 / noise_over_signal**2, rel=1e-6)


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "RePaintScheduler"])
def test_alpha_bar_is_the_product_of_the_alphas(name: str) -> None:
    scheduler = make(CLASSES[name], {})
    alpha_bar = np.array([np.prod(1 - scheduler.betas.double().numpy()[: t + 1]) for t in scheduler.timesteps])
    np.testing.assert_allclose(snr(scheduler), alpha_bar / (1 - alpha_bar), rtol=1e-2)  # float32 alphas, near abar = 1


def test_a_circle_of_time() -> None:
    ipndm, scm = make(CLASSES["IPNDMScheduler"], {}), make(CLASSES["SCMScheduler"], {})
    angle = ipndm.timesteps.double().numpy() * math.pi / 2
    np.testing.assert_allclose(snr(ipndm), 1 / np.tan(angle) ** 2, rtol=1e-5, atol=1e-12)
    first, second, last = snr(scm)
    assert first < 1e-9
    assert second == pytest.approx(1 / math.tan(1.3) ** 2, rel=1e-6)
    assert last == math.inf


@pytest.mark.parametrize("name", ["LTXEulerAncestralRFScheduler", "PiflowScheduler"])
def test_a_perfect_flow_follows_it(name: str) -> None:
    """With the velocity ``n - x_0`` the latents stay on the line between noise and sample; where, is the level."""
    scheduler = CLASSES[name](**({"eta": 0.0} if name.startswith("LTX") else {"n_grid": 2}))
    scheduler.set_timesteps(8)
    x0, noise = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    x, seen = noise, []
    for timestep in scheduler.timesteps:
        seen.append((x[..., 0] / x[..., 1]).item() ** 2)
        velocity = noise - x0
        if name.startswith("Piflow"):
            velocity = torch.cat([velocity] * 2, -1)
        x = scheduler.step(velocity, timestep, x).prev_sample
    np.testing.assert_allclose(snr(scheduler), seen, rtol=1e-4)


def test_closed_forms() -> None:
    decoder = make(CLASSES["ConsistencyDecoderScheduler"], {"sigma_data": 0.5})
    variance = 1 / decoder.c_in.double()[decoder.timesteps].numpy() ** 2  # of the latents: abar sigma_data^2 + 1 - abar
    alpha_bar = (1 - variance) / (1 - 0.5**2)
    np.testing.assert_allclose(snr(decoder), 0.25 * alpha_bar / (1 - alpha_bar), rtol=1e-3)

    helios = make(CLASSES["HeliosScheduler"], {"shift": 3.0})
    sigma = helios.timesteps.double().numpy() / 1000
    np.testing.assert_allclose(snr(helios), ((1 - sigma) / sigma) ** 2, rtol=1e-4, atol=1e-9)

    song = make(CLASSES["ScoreSdeVeScheduler"], {})
    sigma = 0.01 * (1348.0 / 0.01) ** song.timesteps.double().numpy()
    np.testing.assert_allclose(snr(song), 1 / sigma**2, rtol=1e-4)


def test_inverted_sigmas_count_the_signal() -> None:
    """Mochi's schedule: the same noise levels, from the other end; its ``scale_noise`` is not written for that."""
    plain, mochi = (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=i) for i in (False, True))
    for scheduler in (plain, mochi):
        scheduler.set_timesteps(8)
    assert mochi.sigmas[0] < mochi.sigmas[-1] == 1
    np.testing.assert_allclose(snr(mochi), snr(plain), rtol=1e-4, atol=1e-9)


def test_dit_over_fifty_steps() -> None:
    """DiT's betas with DDIM: a gate of [0.1, 10] opens for steps 25 to 44 and one of [0.1, 100] to 47 (C3)."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(50)
    result = snr(scheduler)
    assert np.flatnonzero((result >= 0.1) & (result <= 10)).tolist() == list(range(25, 45))
    assert np.flatnonzero((result >= 0.1) & (result <= 100)).tolist() == list(range(25, 48))


def test_pure_noise_is_zero_and_no_noise_is_infinite() -> None:
    zero_terminal = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    zero_terminal.set_timesteps(5)
    assert snr(zero_terminal)[0] == 0
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    assert snr(flow).tolist() == [0, 1, math.inf]


def test_heun_repeats_a_level_and_is_told_apart_by_position() -> None:
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    first, *rest = snr(scheduler)
    assert rest[0::2] == rest[1::2]
    assert first < rest[0] < rest[2] < rest[4]


def test_timesteps_that_were_given() -> None:
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(timesteps=[999, 500, 1])  # leaves num_inference_steps at None
    np.testing.assert_allclose(snr(scheduler), power_ratio(scheduler, *measured(scheduler)), rtol=1e-9)


SET_BY_THE_CONSTRUCTOR = {
    "DPMSolverSDEScheduler",
    "FlowMapEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "ScoreSdeVeScheduler",
}


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - NO_LEVELS - SET_BY_THE_CONSTRUCTOR))
def test_before_set_timesteps_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLASSES[name], "set_timesteps", lambda *args, **kwargs: None)
    scheduler = make(CLASSES[name], {})
    with pytest.raises(MetricError, match=rf"{name} are not set.*set_timesteps\(num_steps\)") as error:
        snr(scheduler)
    assert isinstance(error.value, (DqarError, ValueError))


def test_sigmas_of_another_schedule_are_refused() -> None:
    scheduler = CLASSES["ScoreSdeVeScheduler"]()
    scheduler.set_timesteps(10)
    with pytest.raises(MetricError, match=r"2000 sigmas for 10 timesteps.*set_sigmas"):
        snr(scheduler)


def test_an_offset_past_the_end_is_the_noisiest_level() -> None:
    scheduler = diffusers.DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[0] == 1000
    first, second = snr(scheduler)[:2]
    assert first == second > 0


def test_continuous_timesteps_are_no_indices() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(3)
    scheduler.timesteps = torch.tensor([0.9, 0.5, 0.1])
    with pytest.raises(MetricError, match="not indices into its alphas_cumprod"):
        snr(scheduler)


def test_a_grid_that_is_not_a_number_is_refused() -> None:
    """The ancestral solver takes the root of a rounding error where two cosine sigmas lie far apart."""
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(8)
    assert scheduler.sigmas_interpol.isnan().any()
    with pytest.raises(MetricError, match=r"NaN at positions \[1\]"):
        snr(scheduler)


def test_stages_are_refused() -> None:
    scheduler = CLASSES["HeliosScheduler"](stages=3)
    scheduler.set_timesteps(5, stage_index=0)
    with pytest.raises(MetricError, match=r"stages=3.*no noise levels"):
        snr(scheduler)


def test_prediction_snr_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    abar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    by_sample = abar[:, None, None, None]
    x_t = by_sample.sqrt() * x0 + (1 - by_sample).sqrt() * noise
    expected = [(x**2).sum() / ((y - x) ** 2).sum() for x, y in zip(x0, x_t, strict=True)]
    torch.testing.assert_close(prediction_snr(x_t, noise, abar), torch.stack(expected), rtol=1e-7, atol=0)
    torch.testing.assert_close(prediction_snr(x_t, noise, 0.5)[1], expected[1], rtol=1e-7, atol=0)
    half = prediction_snr(x_t.half(), noise.half(), abar)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), torch.stack(expected), rtol=5e-3, atol=0)


def test_prediction_snr_of_pure_noise_tends_to_one_half() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 64, 64, generator=generator, dtype=torch.float64)
    assert prediction_snr(1e-4 * x0 + (1 - 1e-8) ** 0.5 * noise, noise, 1e-8).item() == pytest.approx(0.5, rel=0.02)
    assert prediction_snr(x0, noise, 1.0).isfinite().all()  # x_t = x0: only the floor is left


@pytest.mark.parametrize("alpha_bar", [0.0, -0.1, 1.5, math.nan, torch.ones(3)])
def test_prediction_snr_refuses_what_is_no_signal_power(alpha_bar: Any) -> None:
    x = torch.ones(2, 4)
    with pytest.raises(MetricError, match="alpha_bar"):
        prediction_snr(x, x, alpha_bar)
    with pytest.raises(MetricError, match="x_t is"):
        prediction_snr(x, x[:1], 0.5)


def test_latent_norm_is_per_sample_and_does_not_overflow() -> None:
    x = torch.tensor([[[3.0, 4.0]], [[5.0, 12.0]]])
    assert latent_norm(x).tolist() == [5, 13]
    large = torch.full((1, 4, 128, 128), 8.0, dtype=torch.float16)
    assert latent_norm(large).item() == pytest.approx(8 * 256)
