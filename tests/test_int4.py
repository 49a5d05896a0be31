"""INT4: two values a byte, against a reference in float64, its error bound, and what it does with damage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dqar_fx
from dqar_fx import CacheConfig, Schedule, dequantize, quantize
from dqar_fx.errors import CacheError
from dqar_fx.graph.specialise import exit_layout
from dqar_fx.runtime.sizes import exit_spec
from tests.families import FAMILIES, SCHEDULE
from tests.models import NUM_STEPS, make_dit, replaying, sample

#: Channels, and how many share a scale.
LAYOUTS = [(8, None), (8, 4), (8, 3), (7, None), (7, 3), (7, 2), (1, None), (9, 32), (96, 32)]
layouts = pytest.mark.parametrize(("size", "group"), LAYOUTS)


def groups_of(size: int, group: int | None) -> list[slice]:
    step = group or size
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_and_scales_are_those_of_the_formula(size: int, group: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, size).to(dtype)
    q, scale = quantize(x, bits=4, group=group)
    assert (q.shape, q.dtype) == ((2, 3, 5, -(-size // 2)), torch.uint8)
    parts = groups_of(size, group)
    assert (scale.shape, scale.dtype) == ((2, 3, 5, len(parts)), torch.float32)
    back = dequantize(q, scale, size=size, group=group)
    for index, part in enumerate(parts):
        own = x[..., part].float()
        expected = own.abs().amax(-1) / 7
        assert torch.equal(scale[..., index], expected)
        levels = (own / expected.unsqueeze(-1)).round().clamp(-7, 7)
        assert torch.equal(back[..., part], levels * expected.unsqueeze(-1))
        error = (own - back[..., part]).abs()
        assert (error <= expected.unsqueeze(-1) / 2 * (1 + 1e-5)).all()


@layouts
def test_the_extremes_of_a_group_come_back_whole(size: int, group: int | None) -> None:
    for value in (6e-8, 3.0, 6e4):
        x = torch.full((2, size), value)
        torch.testing.assert_close(dequantize(*quantize(x, bits=4, group=group), size=size, group=group), x)
        torch.testing.assert_close(dequantize(*quantize(-x, bits=4, group=group), size=size, group=group), -x)


@layouts
def test_zeros_stay_zeros(size: int, group: int | None) -> None:
    x = torch.randn(3, size)
    x[1] = 0
    back = dequantize(*quantize(x, bits=4, group=group), size=size, group=group)
    assert not back[1].any()
    assert back[0].any()


@layouts
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_group_comes_back_as_nan_and_the_others_untouched(
    size: int, group: int | None, damage: float
) -> None:
    x = torch.randn(3, size)
    whole = dequantize(*quantize(x, bits=4, group=group), size=size, group=group)
    x[1, -1] = damage
    back = dequantize(*quantize(x, bits=4, group=group), size=size, group=group)
    damaged = torch.zeros(3, size, dtype=torch.bool)
    damaged[1, groups_of(size, group)[-1]] = True
    assert torch.equal(back.isnan(), damaged)
    assert torch.equal(back[~damaged], whole[~damaged])


def test_a_size_need_only_be_given_where_it_is_odd() -> None:
    x = torch.randn(3, 8)
    q, scale = quantize(x, bits=4)
    assert torch.equal(dequantize(q, scale), dequantize(q, scale, size=8))
    assert dequantize(q, scale, torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (2, 4, 5, 7)])
def test_strides_survive_a_round_trip(shape: tuple[int, ...]) -> None:
    """What reads a stored value may ``view`` it as it does the fresh one."""
    x = torch.randn(shape).transpose(1, 2)
    q, scale = quantize(x, bits=4)
    assert shape[-1] % 2 or dequantize(q, scale).stride() == x.stride()  # to pair an odd number, torch makes a copy
    layout = exit_layout(x, CacheConfig(dtype="int4"), None, 2)
    values, _ = exit_spec(x, layout, {}, on_host=False).allocate()
    assert values.shape == q.shape
    values.copy_(q)
    assert dequantize(values, scale, size=shape[-1]).stride() == x.stride()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4, "granularity": "channel"}, "4 bits have scales per token or per group"),
        ({"bits": 2}, "bits=2 with group=None: use 8 bits, or 4 bits"),
        ({"bits": 8, "group": 4}, "bits=8 with group=4"),
        ({"bits": 4, "group": 0}, "bits=4 with group=0"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        quantize(torch.randn(2, 8), **arguments)  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_refused() -> None:
    q, scale = quantize(torch.randn(2, 7), bits=4, group=2)
    for arguments in ({}, {"size": 7}, {"size": 9, "group": 2}):
        with pytest.raises(CacheError, match="do not fit packed values"):
            dequantize(q, scale, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "head"}, "INT4 has scales per token or"),
        ({"group": 0}, r"CacheConfig\.group is 0\. Give a number of channels"),
        ({"group": True}, r"CacheConfig\.group is True"),
        ({"group": 32, "dtype": "int8"}, r"CacheConfig\.group is 32, which only dtype='int4' reads"),
    ],
)
def test_a_config_that_has_no_meaning_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        CacheConfig(**{"dtype": "int4", **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["int4:token", "int4:group32", "kv:int8/int4:group64@cpu"])
def test_text_round_trips(text: str) -> None:
    assert str(CacheConfig.parse(text)) == text
    assert CacheConfig().dtype != "int4"  # never the default


def test_what_cannot_be_packed_is_stored_in_int8() -> None:
    cache = CacheConfig(dtype="int4")
    assert exit_layout(torch.randn(2, 5, 8), cache, None, 2).size == 8
    assert exit_layout(torch.randn(2, 8, 5).transpose(1, 2), cache, None, 2).size == 0


def stored(group: int | None) -> object:
    return lambda x: dequantize(*quantize(x, bits=4, group=group), x.dtype, size=x.shape[-1], group=group)


@pytest.mark.parametrize(("group", "scales"), [(None, 1), (8, 4), (12, 3)])
def test_reuse_is_the_round_trip_of_the_output(group: int | None, scales: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule.interval(NUM_STEPS, every=3, warmup=1)
    model = dqar_fx.optimize(make_dit(), schedule, cache=CacheConfig(dtype="int4", group=group), backend="eager")
    found = sample(model)
    assert dqar_fx.runtime(model).stats.cache_bytes == 3 * 2 * 16 * (32 // 2 + 4 * scales)
    eager = make_dit()
    monkeypatch.setattr(dqar_fx, "quantize", lambda x: quantize(x, bits=4, group=group))
    monkeypatch.setattr(dqar_fx, "dequantize", lambda q, s: dequantize(q, s, size=32, group=group))
    with replaying(eager, schedule.plan(3), quantized=True):
        expected = sample(eager)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_keys_and_values_in_four_bits() -> None:
    from tests.runtime.test_keys_values import expected, sampled

    family = FAMILIES["SD3"]
    model = family.optimized(SCHEDULE, cache=CacheConfig("kv", ("int8", "int4"), group=4))
    found = sampled(family, model)
    oracle = expected(family, lambda x: dequantize(*quantize(x), x.dtype), stored(4))  # type: ignore[arg-type]
    torch.testing.assert_close(found, oracle, rtol=0, atol=2e-6 * float(oracle.abs().max()))
    rows = 2 * 2 * 2 * 21
    sites = dqar_fx.runtime(model).report().to_dict()["sites"]
    assert sum(site["cache_bytes"] for site in sites) == rows * (8 + 4) + rows * (4 + 2 * 4)


@pytest.mark.parametrize(("size", "group"), [(64, None), (63, 32)])
def test_compiled_it_gives_the_same(size: int, group: int | None) -> None:
    """Inductor may multiply by a reciprocal where eager divides: a quotient on a tie may round to the other side."""

    def there_and_back(x: Tensor) -> Tensor:
        return dequantize(*quantize(x, bits=4, group=group), size=size, group=group)

    x = torch.randn(2, 64, size)
    with torch.no_grad():
        found = torch.compile(there_and_back, fullgraph=True)(x)
    off = ~torch.isclose(found, there_and_back(x), rtol=1e-6, atol=0)
    assert off.count_nonzero() <= x.numel() // 1000
