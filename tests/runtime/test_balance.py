"""Balanced caches in a run, against an eager model that is handed what they should hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqar_fx
from dqar_fx import Balance, CacheConfig, ChangeGate, Gates, Schedule, calibrate_balance, dequantize, quantize
from tests.families import FAMILIES, NUM_STEPS, SCHEDULE, assert_planned
from tests.models import NUM_STEPS as STEPS
from tests.models import make_dit, sample
from tests.models import replaying as replaying_outputs
from tests.runtime.test_keys_values import by_schedule, sampled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def largest(x: Tensor, dim: int) -> Tensor:
    return x.abs().max(dim, keepdim=True).values


def nearest_power(x: Tensor) -> Tensor:
    return 2.0 ** x.log2().round()


@contextmanager
def replaying(model: nn.Module, sites: int, factors: Callable[[int, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Where the plan reuses, an attention gets stored keys, rounded while multiplied by ``factors``, and its queries.

    The balance is undone in the keys: in the products with the queries, that is the same to the last bit.
    """
    plan, attend = SCHEDULE.plan(sites), F.scaled_dot_product_attention
    step, site = -1, 0
    stored: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(*_: object) -> None:
        nonlocal step, site
        step, site = step + 1, 0

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        nonlocal site
        if plan.reuse[step, site]:
            key, value = stored[site]
        else:
            of_key = factors(site, query, key)
            stored[site] = dequantize(*quantize(key * of_key)) / of_key, dequantize(*quantize(value))
        site += 1
        return attend(query, key, value)

    def call(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return attention(query, key, value)  # these models give no mask

    handle = model.register_forward_pre_hook(begin)
    with mock.patch.object(F, "scaled_dot_product_attention", call):
        yield
    handle.remove()


def balanced_dynamically(_: int, query: Tensor, key: Tensor) -> Tensor:
    return nearest_power((largest(query, -2) / largest(key, -2)).sqrt())


@pytest.mark.parametrize("name", ["DiT", "SD3"])
def test_reuse_is_to_the_bit_what_balanced_keys_give(name: str) -> None:
    family = FAMILIES[name]
    model = family.optimized(cache=by_schedule(balance="dynamic"), fullgraph=True)
    found = sampled(family, model)
    assert_planned(model, family.sites)
    eager = family.make()
    with replaying(eager, family.sites, balanced_dynamically):
        expected = sampled(family, eager)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_calibrated_factors_are_read_at_every_store_and_never_written(device: str | None) -> None:
    family = FAMILIES["DiT"]
    powers = [2.0 ** torch.randint(-3, 4, (1, 2, 1, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    balance = Balance("kv", {f"transformer_blocks.{i}.attn1/0": p for i, p in enumerate(powers)}, 1)
    model = family.optimized(cache=by_schedule(balance=balance, device=device))
    eager = family.make()
    with replaying(eager, family.sites, lambda site, *_: powers[site]):
        expected = sampled(family, eager)
    for _ in range(2):
        torch.testing.assert_close(sampled(family, model), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    rows, factors = 2 * 2 * 16, 2 * 16  # samples, heads and tokens; heads and channels
    assert dqar_fx.runtime(model).stats.cache_bytes == 2 * (2 * rows * (16 + 4) + factors * 4)


@pytest.mark.parametrize(("bits", "given"), [(8, False), (4, True)])
def test_outputs_are_stored_balanced_and_read_as_they_were(bits: int, given: bool) -> None:
    schedule = Schedule.interval(STEPS, every=3, warmup=1)
    names = [f"transformer_blocks.{i}.attn1/0" for i in range(3)]
    fixed = torch.rand(1, 1, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    balance = Balance("output", dict.fromkeys(names, fixed), 1) if given else "dynamic"
    dtype = "int8" if bits == 8 else "int4"
    model = dqar_fx.optimize(make_dit(), schedule, cache=CacheConfig(dtype=dtype, balance=balance), backend="eager")
    found = sample(model)

    def through(x: Tensor) -> tuple[Tensor, Tensor]:
        factors = fixed if given else largest(x, -2) ** -0.5
        return dequantize(*quantize(x * factors, bits=bits)) / factors, factors

    eager = make_dit()
    with (
        mock.patch.object(dqar_fx, "quantize", through),
        mock.patch.object(dqar_fx, "dequantize", lambda q, _: q),
        replaying_outputs(eager, schedule.plan(3), quantized=True),
    ):
        expected = sample(eager)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


def test_a_gate_on_change_compares_with_what_the_keys_were() -> None:
    """The same latent and timestep at every step: nothing changes, whatever the keys were multiplied by."""
    family = FAMILIES["DiT"]
    gates = Gates(entropy=None, snr=None, change=ChangeGate(0.02), max_reuse=1)
    schedule = Schedule.always(NUM_STEPS, warmup=2)
    cache = by_schedule(("int8", "native"), balance="dynamic")
    model = family.optimized(schedule, cache=cache, gates=gates)
    given, runtime = family.conditioning(), dqar_fx.runtime(model)
    with runtime.generation(num_steps=NUM_STEPS):
        for step in range(NUM_STEPS):
            runtime.begin_step(step)
            family.call(model, 3, given=given)
        changes = [m.change for m in runtime.stats.measurements if m.change == m.change]
    assert changes
    assert max(changes) < 0.02  # of INT8 only


def test_a_saved_balance_serves_other_sizes_and_the_report_names_it(tmp_path: Path) -> None:
    family = FAMILIES["DiT"]
    file = tmp_path / "dit.safetensors"
    eager = family.make()
    calibrate_balance(eager, lambda: sampled(family, eager), "kv").save(file)
    model = family.optimized(cache=CacheConfig.parse(f"kv:int8+balance={file}"))
    found, without = sampled(family, model, batch=3), sampled(family, eager, batch=3)
    assert float((found - without).norm() / without.norm()) < 0.05
    report = dqar_fx.runtime(model).report()
    assert report.unbalanced == ()
    assert report.to_dict()["cache"] == f"kv:int8:token+balance={file}"


def test_the_report_says_what_is_not_balanced() -> None:
    class OneTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            kv = self.kv(x * timestep).unsqueeze(1)
            return x + F.scaled_dot_product_attention(self.q(x).unsqueeze(1), kv, kv).squeeze(1)

    model = OneTensor().eval().requires_grad_(False)
    dqar_fx.optimize(model, Schedule.always(3), cache=CacheConfig("kv", balance="dynamic"), backend="eager")
    with torch.no_grad():
        model(torch.randn(2, 5, 8), torch.tensor(1.0))
    report = dqar_fx.runtime(model).report()
    assert "not balanced: ?: its keys are its values" in str(report)
    assert [entry["reason"] for entry in report.to_dict()["unbalanced"]] == [reason for _, reason in report.unbalanced]


def test_heads_of_queries_that_share_keys_are_scaled_by_the_factors_of_theirs() -> None:
    class Grouped(nn.Module):
        """Two heads of keys, whose salient channels differ, for six of queries."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 48), nn.Linear(8, 16), nn.Linear(8, 16)
            self.out = nn.Linear(48, 8)
            with torch.no_grad():
                self.k.weight[[1, 14]] *= 100

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            q, k, v = (y(x).unflatten(-1, (-1, 8)).transpose(1, 2) for y in (self.q, self.k, self.v))
            attended = F.scaled_dot_product_attention(q / timestep, k, v, enable_gqa=True)
            return self.out(attended.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Grouped().eval().requires_grad_(False)
    x, timestep = torch.randn(2, 5, 8), torch.tensor(30.0)
    expected = model(x, timestep)
    dqar_fx.optimize(model, Schedule.always(3), cache=CacheConfig("kv", balance="dynamic"), backend="eager")
    runtime = dqar_fx.runtime(model)
    with torch.no_grad(), runtime.generation(num_steps=3):
        for step in range(3):
            runtime.begin_step(step)
            found = model(x, timestep)
        assert runtime.stats.reused == 2
    assert not runtime.report().unbalanced
    assert float((found - expected).norm() / expected.norm()) < 0.01
