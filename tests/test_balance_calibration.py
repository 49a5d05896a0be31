"""A run that is watched: the balance that comes of it, and the errors that it is said to make smaller."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, CacheError, CaptureError, RuntimeStateError, calibrate_balance, dequantize, quantize
from dqar_fx.balance_calibration import decibels, measure_balance
from dqar_fx.schedule import Schedule

STEPS, HEADS, SIZE, WIDTH = 4, 2, 8, 16


class Attention(nn.Module):
    """A joint projection; channel 3 of its keys and channel 5 of its output stand out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.kv.weight[3] *= 40
            self.out.weight[5] *= 40

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.kv(x).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in (self.q(x), key, value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + timestep * F.layer_norm(block(x), (WIDTH,))
        return x


def make() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def run(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        model(torch.randn(3, 6, WIDTH, generator=generator), torch.tensor(1.0 + step))


def seen_by_hooks(model: Model, seed: int = 0) -> tuple[list[list[Tensor]], list[list[tuple[Tensor, ...]]]]:
    """By site: the outputs, and the queries, keys and values, of all steps."""
    outputs: list[list[Tensor]] = [[], []]
    operands: list[list[tuple[Tensor, ...]]] = [[], []]
    attend, calls = F.scaled_dot_product_attention, iter(range(10**6))

    def attention(*given: Tensor) -> Tensor:
        operands[next(calls) % 2].append(given)
        return attend(*given)

    handles = [
        block.register_forward_hook(lambda _m, _a, output, i=i: outputs[i].append(output))
        for i, block in enumerate(model.blocks)
    ]
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        run(model, seed)
    for handle in handles:
        handle.remove()
    return outputs, operands


def test_outputs_are_calibrated_by_their_mean_salience() -> None:
    model = make()
    balance = calibrate_balance(model, lambda: run(model))
    outputs, _ = seen_by_hooks(model)
    assert (balance.target, balance.steps, list(balance.factors)) == ("output", STEPS, ["blocks.0/0", "blocks.1/0"])
    for site, found in enumerate(balance.factors.values()):
        mean = np.mean([x.abs().amax((0, 1)).numpy() for x in outputs[site]], 0)
        assert found.shape == (1, 1, WIDTH)
        np.testing.assert_allclose(found.flatten().numpy(), mean**-0.5, rtol=2e-4)


def test_keys_are_calibrated_by_rank_correlation_with_the_queries() -> None:
    model = make()
    balance = calibrate_balance(model, lambda: run(model), "kv")
    _, operands = seen_by_hooks(model)
    assert (balance.steps, list(balance.factors)) == (STEPS, ["blocks.0/0", "blocks.1/0"])
    for site, found in enumerate(balance.factors.values()):
        assert found.shape == (1, HEADS, 1, SIZE)
        for head in range(HEADS):
            of_q = [q[:, head].abs().amax((0, 1)).double().numpy() for q, _, _ in operands[site]]
            of_k = [k[:, head].abs().amax((0, 1)).double().numpy() for _, k, _ in operands[site]]
            eta = np.exp([-stats.spearmanr(k, q).statistic for q, k in zip(of_q, of_k, strict=True)])
            eta /= eta.sum()
            exact = np.sqrt((eta @ np.stack(of_q)) / (eta @ np.stack(of_k)))
            expected = 2.0 ** np.rint(np.log2(exact))
            np.testing.assert_array_equal(found[0, head, 0].numpy(), expected)
    assert next(iter(balance.factors.values()))[0, 0, 0, 3] < 0.5  # the salient one


def through(x: Tensor, factors: Tensor | float) -> Tensor:
    return dequantize(*quantize(x * factors)) / factors


def test_the_errors_are_those_of_what_would_be_stored() -> None:
    model = make()
    cache = CacheConfig("kv", lossless=False)
    balance = calibrate_balance(model, lambda: run(model), "kv")
    channel = CacheConfig("kv", granularity="channel")
    found = measure_balance(model, lambda: run(model, 1), [cache, channel], balance)
    assert {text: list(modes) for text, modes in found.items()} == {
        "kv:int8:token": ["plain", "dynamic", "calibrated"],
        "kv:int8:channel": ["plain"],  # which has nothing to balance
    }
    _, operands = seen_by_hooks(model, 1)
    for mode, errors in found["kv:int8:token"].items():
        for site in range(2):
            value = attention = exact_value = exact_attention = 0.0
            for q, k, v in operands[site]:
                factors: Tensor | float = 1.0
                if mode == "calibrated":
                    factors = balance.factors[f"blocks.{site}/0"]
                elif mode == "dynamic":
                    factors = 2.0 ** (q.abs().amax(2, True) / k.abs().amax(2, True)).sqrt().log2().round()
                rounded, exact = through(k, factors), F.scaled_dot_product_attention(q, k, v)
                value += float((rounded - k).square().sum())
                attention += float((F.scaled_dot_product_attention(q, rounded, v) - exact).square().sum())
                exact_value, exact_attention = (
                    exact_value + float(k.square().sum()),
                    exact_attention + float(exact.square().sum()),
                )
            told = errors[f"blocks.{site}"]
            assert told["value"].relative == pytest.approx((value / exact_value) ** 0.5, rel=1e-3)
            assert told["attention"].relative == pytest.approx((attention / exact_attention) ** 0.5, rel=1e-3)
    plain, balanced = (found["kv:int8:token"][m]["blocks.0"]["attention"].relative for m in ("plain", "calibrated"))
    assert balanced < plain / 2
    assert decibels(0.01) == pytest.approx(40.0)
    assert decibels(0.0) is None


def test_the_model_is_left_as_it_was() -> None:
    model = make()
    calibrate_balance(model, lambda: run(model))
    assert model._compiled_call_impl is None
    assert not model._forward_pre_hooks
    with pytest.raises(ZeroDivisionError):
        calibrate_balance(model, lambda: 1 // 0)
    assert model._compiled_call_impl is None
    dqar_fx.optimize(model, Schedule.always(3), backend="eager")
    with pytest.raises(RuntimeStateError, match="optimised already"):
        calibrate_balance(model, lambda: run(model))


class Broken(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = super().forward(x, timestep)
        torch._dynamo.graph_break()
        return super().forward(x, timestep)


class Bare(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = (x * timestep).unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x).squeeze(1)


def test_what_cannot_be_calibrated_says_why() -> None:
    model: Any = make()
    with pytest.raises(CacheError, match="target is 'keys'"):
        calibrate_balance(model, lambda: run(model), "keys")
    with pytest.raises(CacheError, match="for Model: `run` did not call the model"):
        calibrate_balance(model, lambda: None)
    model = Broken().eval().requires_grad_(False)
    with pytest.raises(CaptureError, match=r"Broken is captured in several graphs .* balance='dynamic'"):
        calibrate_balance(model, lambda: run(model))
    model = Bare().eval().requires_grad_(False)
    with pytest.raises(CacheError, match="for Bare: nothing of it can be balanced"):
        calibrate_balance(model, lambda: run(model), "kv")
