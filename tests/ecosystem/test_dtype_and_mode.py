"""Another dtype, autocast, another mode: between generations and in the middle of one."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from tests.families import DIT, FAMILIES, FLUX, NOTHING, NUM_STEPS, SD3, WAN, Family, assert_planned, computed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_small_models_reuse_as_planned(family: Family) -> None:
    model = family.optimized(fullgraph=True)
    got = family.sample(model)
    assert_planned(model, family.sites)
    plain = family.sample(family.make())
    assert torch.equal(got[:2], plain[:2])
    assert not torch.equal(got[2], plain[2])


@pytest.mark.parametrize(("family", "dtype"), [(DIT, FP16), (FLUX, FP16), (WAN, BF16)])
def test_another_dtype_between_generations_is_a_fresh_model_of_that_dtype(family: Family, dtype: torch.dtype) -> None:
    model = family.optimized()
    family.sample(model)
    model.to(dtype)
    got = family.sample(model, dtype=dtype)
    assert_planned(model, family.sites)
    assert dqar_fx.runtime(model).stats.captures == 2
    assert got.dtype == dtype
    assert torch.equal(got, family.sample(family.optimized(dtype=dtype), dtype=dtype))


def test_another_dtype_and_back() -> None:
    model = DIT.optimized()
    DIT.sample(model)
    model.to(BF16)
    DIT.sample(model, dtype=BF16)
    model.to(FP32)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = DIT.sample(model)
    rounded = DIT.make(BF16).to(FP32)  # what is left of the weights
    fresh = dqar_fx.optimize(
        rounded, dqar_fx.runtime(model).schedule, cache=dqar_fx.runtime(model).cache, backend="eager"
    )
    assert torch.equal(got, DIT.sample(fresh))


def test_another_dtype_in_the_middle_computes() -> None:
    model, plain = DIT.optimized(), DIT.make()
    for step in range(2):
        DIT.call(model, step)
    for m in (model, plain):
        m.to(BF16)
    assert torch.equal(DIT.call(model, 2, dtype=BF16), DIT.call(plain, 2, dtype=BF16))
    assert computed(model, 2)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision_without_reuse_is_the_eager_model(dtype: torch.dtype) -> None:
    assert torch.equal(
        SD3.sample(SD3.optimized(NOTHING, dtype=dtype), dtype=dtype), SD3.sample(SD3.make(dtype), dtype=dtype)
    )


def autocast(enabled: bool = True) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=BF16, enabled=enabled)


def sampled(model: nn.Module, context: AbstractContextManager[object]) -> Tensor:
    with context:
        return SD3.sample(model)


def test_autocast_and_full_precision_take_turns() -> None:
    model = SD3.optimized()
    fresh = sampled(SD3.optimized(), autocast()), SD3.sample(SD3.optimized())
    for _ in range(2):
        assert torch.equal(sampled(model, autocast()), fresh[0])
        assert_planned(model, SD3.sites)
        assert torch.equal(SD3.sample(model), fresh[1])
        assert_planned(model, SD3.sites)
    assert dqar_fx.runtime(model).stats.captures == 2
    assert not torch.equal(fresh[0], fresh[1])


def test_autocast_without_reuse_is_the_eager_model() -> None:
    assert torch.equal(sampled(SD3.optimized(NOTHING), autocast()), sampled(SD3.make(), autocast()))


def test_autocast_in_the_middle_computes_at_every_switch() -> None:
    model, plain = SD3.optimized(dqar_fx.Schedule.always(NUM_STEPS)), SD3.make()
    for step, enabled in enumerate([False, False, True, True, False]):
        with autocast(enabled):
            got, expected = SD3.call(model, step), SD3.call(plain, step)
        assert computed(model, step) == (step in {0, 2, 4})
        assert torch.equal(got, expected) == computed(model, step)


def test_no_grad_and_inference_mode_inside_one_generation_compute_at_every_switch() -> None:
    model, plain = SD3.optimized(dqar_fx.Schedule.always(NUM_STEPS)), SD3.make()
    for step, inference in enumerate([False, False, True, True, False]):
        with torch.inference_mode(inference):
            got, expected = SD3.call(model, step), SD3.call(plain, step)
        assert computed(model, step) == (step in {0, 2, 4})
        assert torch.equal(got, expected) == computed(model, step)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, plain = SD3.optimized(NOTHING), SD3.make()
        assert torch.equal(SD3.sample(model), SD3.sample(plain))
        reusing = SD3.optimized()
        got = SD3.sample(reusing)
    assert_planned(reusing, SD3.sites)
    assert torch.equal(got, SD3.sample(SD3.optimized()))
