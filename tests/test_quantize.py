"""INT8 against an independent reference in float64, its error bound, and what it does with damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqar_fx.config import GRANULARITIES
from dqar_fx.errors import CacheError
from dqar_fx.quantize import dequantize, quantize, scale_shape

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: shape, granularity, num_heads, shape of the scales
LAYOUTS = [
    ((3, 8), "token", None, (3, 1)),
    ((3, 8), "tensor", None, (3, 1)),
    ((3, 8), "channel", None, (3, 8)),
    ((3, 8), "head", 4, (3, 4)),
    ((2, 5, 8), "token", None, (2, 5, 1)),
    ((2, 5, 8), "tensor", None, (2, 1, 1)),
    ((2, 5, 8), "channel", None, (2, 1, 8)),
    ((2, 5, 8), "head", 4, (2, 1, 4)),
    ((2, 5, 8), "head", 8, (2, 1, 8)),
    ((2, 5, 8), "head", 1, (2, 1, 1)),
    ((2, 3, 5, 8), "token", None, (2, 3, 5, 1)),
    ((2, 3, 5, 8), "tensor", None, (2, 1, 1, 1)),
    ((2, 3, 5, 8), "channel", None, (2, 3, 1, 8)),
    ((2, 3, 5, 8), "head", None, (2, 3, 1, 1)),
    ((2, 3, 5, 8), "head", 4, (2, 1, 1, 4)),
]
layouts = pytest.mark.parametrize(("shape", "granularity", "heads", "scales"), LAYOUTS)


def groups(shape: tuple[int, ...], granularity: str, heads: int | None) -> np.ndarray:
    """For each element the number of the group that it shares a scale with, said in the plainest way."""
    number = np.empty(shape, dtype=object)
    for index in np.ndindex(*shape):
        channel = index[-1]
        if granularity == "token":
            key: tuple[int, ...] = index[:-1]
        elif granularity == "tensor":
            key = index[:1]
        elif granularity == "channel":
            key = (*index[:-2], channel) if len(shape) > 2 else index
        elif heads is None:
            key = index[:2]
        else:
            key = (index[0], channel // (shape[-1] // heads))
        number[index] = key
    return np.unique(np.array([str(k) for k in number.ravel()]), return_inverse=True)[1].reshape(shape)


def reference(x: Tensor, granularity: str, heads: int | None) -> tuple[np.ndarray, np.ndarray]:
    """``q`` and the scale of each element, in float64."""
    values = x.double().numpy()
    group = groups(values.shape, granularity, heads)
    scale = np.zeros(values.shape)
    for g in range(group.max() + 1):
        scale[group == g] = np.abs(values[group == g]).max() / 127
    return np.where(scale == 0, 0, np.clip(np.rint(values / np.where(scale == 0, 1, scale)), -127, 127)), scale


def spread(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The scale of each element."""
    if scale.shape[-1] not in (1, shape[-1]):
        scale = scale.repeat_interleave(shape[-1] // scale.shape[-1], -1)
    return scale.expand(shape)


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_with_the_reference(
    shape: tuple[int, ...], granularity: str, heads: int | None, scales: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    q, scale = quantize(x, granularity, num_heads=heads)
    assert (q.shape, q.dtype) == (x.shape, torch.int8)
    assert (scale.shape, scale.dtype) == (scales, torch.float32)
    assert scale_shape(shape, granularity, heads) == scales
    expected, expected_scale = reference(x.float(), granularity, heads)
    np.testing.assert_allclose(spread(scale, shape).numpy(), expected_scale, rtol=2e-7)
    # float32 may round a quotient that lies on a tie to the other side
    near_tie = np.abs(np.abs(x.double().numpy() / expected_scale) % 1 - 0.5) < 1e-5
    np.testing.assert_array_equal(q.numpy()[~near_tie], expected[~near_tie])
    assert np.abs(q.numpy() - expected).max() <= 1


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_stays_within_half_a_scale(
    shape: tuple[int, ...], granularity: str, heads: int | None, scales: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    q, scale = quantize(x, granularity, num_heads=heads)
    back = dequantize(q, scale)
    assert (back.shape, back.dtype) == (x.shape, torch.float32)
    assert ((back.double() - x.double()).abs() <= spread(scale, shape).double() / 2 + 1e-6 * x.double().abs()).all()
    assert dequantize(q, scale, dtype).dtype == dtype
    assert torch.equal(dequantize(q, scale, dtype), back.to(dtype))


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES))
def test_the_error_bound_holds_at_every_magnitude(
    data: st.DataObject, layout: tuple[tuple[int, ...], str, int | None, tuple[int, ...]], dtype: torch.dtype
) -> None:
    shape, granularity, heads, _ = layout
    bound = 6e4 if dtype == torch.float16 else 1e30
    tiny = 6e-8 if dtype == torch.float16 else 1e-30
    magnitude = st.floats(tiny, bound)
    values = data.draw(
        st.lists(st.one_of(st.just(0.0), magnitude, magnitude.map(lambda v: -v)), min_size=1, max_size=12)
    )
    count = int(np.prod(shape))
    x = torch.tensor((values * count)[:count], dtype=torch.float64).reshape(shape).to(dtype)
    q, scale = quantize(x, granularity, num_heads=heads)
    assert q.abs().max() <= 127
    error = (x.double() - q.double() * spread(scale, shape).double()).abs()
    assert (error <= spread(scale, shape).double() / 2 + 1e-6 * x.double().abs()).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e-8), (torch.float16, 6e4), (torch.bfloat16, 3e38)])
def test_the_ends_of_the_range_neither_vanish_nor_overflow(dtype: torch.dtype, value: float, granularity: str) -> None:
    x = torch.full((2, 3, 4), value, dtype=dtype)
    back = dequantize(*quantize(x, granularity, num_heads=2), dtype)
    assert torch.equal(back, x)
    assert torch.equal(dequantize(*quantize(-x, granularity, num_heads=2), dtype), -x)  # the range is symmetric


@layouts
def test_zeros_stay_zeros(shape: tuple[int, ...], granularity: str, heads: int | None, scales: tuple[int, ...]) -> None:
    for zero in (0.0, -0.0):
        q, scale = quantize(torch.full(shape, zero), granularity, num_heads=heads)
        assert not q.any()
        assert not scale.any()
        assert not dequantize(q, scale).any()


def test_a_row_of_zeros_among_others_stays_zero() -> None:
    x = torch.randn(2, 3, 4)
    x[1, 2] = 0
    q, scale = quantize(x)
    assert scale[1, 2] == 0
    assert not dequantize(q, scale)[1, 2].any()
    assert scale.count_nonzero() == 5


@layouts
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_group_comes_back_as_nan_and_the_others_untouched(
    shape: tuple[int, ...], granularity: str, heads: int | None, scales: tuple[int, ...], damage: float
) -> None:
    x = torch.randn(shape)
    whole = dequantize(*quantize(x, granularity, num_heads=heads))
    position = tuple(s - 1 for s in shape)
    x[position] = damage
    q, scale = quantize(x, granularity, num_heads=heads)
    back = dequantize(q, scale)
    group = groups(shape, granularity, heads)
    damaged = torch.from_numpy(group == group[position])
    assert torch.equal(back.isnan(), damaged)
    assert torch.equal(spread(scale, shape).isnan(), damaged)  # so no int8 that NaN is cast to can hide it
    assert torch.equal(back[~damaged], whole[~damaged])


def test_a_value_beyond_float32_is_damage() -> None:
    assert dequantize(*quantize(torch.tensor([[1e300, 1.0]], dtype=torch.float64))).isnan().all()


@layouts
def test_samples_do_not_see_each_other(
    shape: tuple[int, ...], granularity: str, heads: int | None, scales: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    q, scale = quantize(x, granularity, num_heads=heads)
    for other in (1e6, float("nan"), 0.0):
        changed = x.clone()
        changed[1:] = other
        q_changed, scale_changed = quantize(changed, granularity, num_heads=heads)
        assert torch.equal(q_changed[0], q[0])
        assert torch.equal(scale_changed[0], scale[0])


def test_strides_survive_a_round_trip() -> None:
    """What reads a stored value may ``view`` it as it does the fresh one."""
    x = torch.randn(2, 5, 8).transpose(1, 2)
    for granularity, heads in (("token", None), ("tensor", None), ("channel", None), ("head", 5)):
        back = dequantize(*quantize(x, granularity, num_heads=heads))
        assert back.stride() == x.stride()


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (
            torch.ones(2, 3, dtype=torch.int32),
            {},
            r"^cannot quantise a tensor of dtype torch\.int32: floating point is needed",
        ),
        (torch.ones(3), {}, r"^cannot quantise a tensor of shape \(3,\): at least \[batch, channels\] is needed"),
        (torch.ones(2, 3), {"granularity": "row"}, r"^granularity is 'row'\. Use one of token, tensor, channel, head"),
        (torch.ones(2, 3, 4), {"granularity": "head"}, r"got shape \(2, 3, 4\) and num_heads=None\. Pass num_heads"),
        (torch.ones(2, 3, 4), {"granularity": "head", "num_heads": 3}, r"num_heads dividing the last dimension"),
        (torch.ones(1, 2, 3, 4, 5), {"granularity": "head"}, r"num_heads=None"),
    ],
)
def test_what_has_no_meaning_is_refused(x: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        quantize(x, **arguments)  # type: ignore[arg-type]


def test_compiled_it_gives_the_same() -> None:
    """Inductor may multiply by a reciprocal where eager divides: a quotient on a tie may round to the other side."""
    x = torch.randn(2, 64, 32)
    with torch.no_grad():
        q, scale = torch.compile(quantize, fullgraph=True)(x)
    eager_q, eager_scale = quantize(x)
    torch.testing.assert_close(scale, eager_scale, rtol=2e-7, atol=0)
    off = (q.int() - eager_q.int()).abs()
    assert off.max() <= 1
    assert off.count_nonzero() <= x.numel() // 1000
