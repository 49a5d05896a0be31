"""Weights that torchao quantised: tensor subclasses as parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

import dqar_fx
from dqar_fx import Schedule
from tests.families import NATIVE, NOTHING, NUM_STEPS, SCHEDULE, SD3, assert_planned, computed


def quantized() -> Any:
    model = SD3.make()
    quantize_(model, Int8WeightOnlyConfig())
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert weights
    assert all(isinstance(weight, Int8Tensor) for weight in weights)
    return model


def optimized(schedule: Schedule = SCHEDULE, backend: str = "eager") -> Any:
    return dqar_fx.optimize(quantized(), schedule, cache=NATIVE, backend=backend, fullgraph=True)


def test_nothing_reused_is_the_eager_model_bit_for_bit() -> None:
    model = optimized(NOTHING)
    got = SD3.sample(model)
    assert torch.equal(got, SD3.sample(quantized()))
    assert not torch.equal(got, SD3.sample(SD3.make()))
    assert dqar_fx.runtime(model).stats.captures == 1


@pytest.fixture(scope="module")
def reused() -> Any:
    model = optimized()
    result = SD3.sample(model)
    assert_planned(model, SD3.sites)
    return result


def test_pieces_with_quantized_parameters_go_through_aot_autograd(reused: Any) -> None:
    model = optimized(backend="aot_eager")  # where tensor subclasses are taken apart; the C++ behind it adds a minute
    got = SD3.sample(model)
    assert float((got - reused).norm() / reused.norm()) < 1e-5
    assert_planned(model, SD3.sites)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(SD3.sample(model), got)


def test_a_model_quantised_after_optimize_is_captured_once_more(reused: Any) -> None:
    model = SD3.optimized()
    SD3.sample(model)
    quantize_(model, Int8WeightOnlyConfig())
    assert torch.equal(SD3.sample(model), reused)
    assert dqar_fx.runtime(model).stats.captures == 2


def test_a_replaced_quantised_weight_drops_what_is_stored() -> None:
    model, plain = optimized(Schedule.always(NUM_STEPS)), quantized()
    for step in range(2):
        SD3.call(model, step)
    assert not computed(model, 1)
    other = nn.Linear(16, 16)
    quantize_(other, Int8WeightOnlyConfig())
    for m in (model, plain):
        m.transformer_blocks[0].attn.to_v.weight = nn.Parameter(copy.deepcopy(other.weight), requires_grad=False)
    assert torch.equal(SD3.call(model, 2), SD3.call(plain, 2))
    assert computed(model, 2)
