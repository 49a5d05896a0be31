"""A piece under each outcome of its guards: what it says, what it computes, and what has fallen away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx

from dqar_fx.config import GRANULARITIES, CacheConfig
from dqar_fx.graph.capture import readable
from dqar_fx.graph.guard import guard_sites
from dqar_fx.graph.partition import Piece, partition
from dqar_fx.graph.sites import find_sites
from dqar_fx.graph.specialise import (
    COMPARING,
    DIFFERENCE,
    LENT,
    STORING,
    BufferUse,
    ExitLayout,
    Outcome,
    Variant,
    exit_layout,
    specialise,
)
from dqar_fx.quantize import dequantize, quantize, scale_shape
from tests.graph.conftest import captured_model, equal, ops, region, traced

COMPUTE, STORE, REUSE = Outcome.COMPUTE, Outcome.STORE, Outcome.REUSE
INT8, NATIVE = CacheConfig(), CacheConfig(dtype="native")
X = torch.randn(1, 2, 4, 3)


def piece_of(function: Callable[..., Any], *sites: tuple[str, str], examples: Sequence[Tensor] = (X,)) -> Piece:
    """One piece for the whole of ``function``; each site is given as (inside, exits)."""
    gm = traced(function, *examples)
    regions = [region(gm, *site) for site in sites]
    (piece,) = partition(guard_sites(gm, regions), regions)
    return piece


def layout(cache: CacheConfig, like: Tensor = X) -> ExitLayout:
    return exit_layout(like, cache, 2, like.shape[0])


def block(x: Tensor, weight: Tensor) -> Tensor:
    normed = x * weight
    out = F.scaled_dot_product_attention(normed, normed, normed)
    return x + out


BLOCK = ("mul scaled_dot_product_attention", "scaled_dot_product_attention")
W = torch.tensor(2.0)


def specialised(outcome: Outcome, cache: CacheConfig) -> Variant:
    piece = piece_of(block, BLOCK, examples=(X, W))
    text = readable(piece.gm)
    variant = specialise(piece.gm, [outcome], [[layout(cache)]], [0])
    assert readable(piece.gm) == text  # the input is untouched
    return variant


def test_compute_is_the_plain_graph() -> None:
    variant = specialised(COMPUTE, INT8)
    assert_expected_inline(
        readable(variant.gm),
        """\
input in_0
input in_1
mul = mul(in_0, in_1)
scaled_dot_product_attention = scaled_dot_product_attention(mul, mul, mul)
add = add(in_0, scaled_dot_product_attention)
return (add,)""",
    )
    assert (variant.inputs, variant.buffers, variant.outputs) == ((0, 1), (), (0,))
    assert equal(variant.gm(X, W), (block(X, W),))


def test_store_copies_the_fresh_value_and_hands_on_the_fresh_value() -> None:
    variant = specialised(STORE, NATIVE)
    assert_expected_inline(
        readable(variant.gm),
        """\
input in_0
input in_1
input stored_0
mul = mul(in_0, in_1)
scaled_dot_product_attention = scaled_dot_product_attention(mul, mul, mul)
copy_ = stored_0.copy_(scaled_dot_product_attention)
add = add(in_0, scaled_dot_product_attention)
return (add,)""",
    )
    assert variant.buffers == (BufferUse(0, 0, 0),)
    stored = torch.zeros_like(X)
    address = stored.data_ptr()
    assert equal(variant.gm(X, W, stored), (block(X, W),))
    assert equal(stored, F.scaled_dot_product_attention(X * W, X * W, X * W))
    assert stored.data_ptr() == address


def test_store_int8_quantises() -> None:
    variant = specialised(STORE, INT8)
    assert_expected_inline(
        readable(variant.gm),
        """\
input in_0
input in_1
input stored_0
input stored_1
mul = mul(in_0, in_1)
scaled_dot_product_attention = scaled_dot_product_attention(mul, mul, mul)
float_1 = scaled_dot_product_attention.float()
abs_1 = float_1.abs()
amax = abs_1.amax((3,), keepdim=True)
isfinite = amax.isfinite()
truediv = truediv(amax, 127)
where = where(isfinite, truediv, nan)
eq = eq(where, 0)
where_1 = where(eq, 1.0, where)
truediv_1 = truediv(float_1, where_1)
round_1 = truediv_1.round()
clamp = round_1.clamp(-127, 127)
to = clamp.to(torch.int8)
copy_ = stored_0.copy_(to)
copy__1 = stored_1.copy_(where)
add = add(in_0, scaled_dot_product_attention)
return (add,)""",
    )
    assert variant.buffers == (BufferUse(0, 0, 0), BufferUse(0, 0, 1))


def test_reuse_reads_and_computes_nothing() -> None:
    variant = specialised(REUSE, NATIVE)
    assert_expected_inline(
        readable(variant.gm),
        """\
input in_0
input stored_0
add = add(in_0, stored_0)
return (add,)""",
    )
    assert (variant.inputs, variant.buffers) == ((0,), (BufferUse(0, 0, 0),))  # the weight is not asked for
    assert equal(variant.gm(X, X * 2), (X + X * 2,))


def test_reuse_int8_dequantises() -> None:
    variant = specialised(REUSE, INT8)
    assert_expected_inline(
        readable(variant.gm),
        """\
input in_0
input stored_0
input stored_1
float_1 = stored_0.float()
mul_1 = mul(float_1, stored_1)
to = mul_1.to(torch.float32)
add = add(in_0, to)
return (add,)""",
    )
    q, scale = quantize(X)
    assert equal(variant.gm(X, q, scale), (X + dequantize(q, scale),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_store_and_reuse_are_quantize_and_dequantize(granularity: str, dtype: torch.dtype) -> None:
    x, w = X.to(dtype), W.to(dtype)
    piece = piece_of(block, BLOCK, examples=(x, w))
    layouts = [[layout(CacheConfig(granularity=granularity), x)]]
    attention = F.scaled_dot_product_attention(x * w, x * w, x * w)
    buffers = [torch.empty(X.shape, dtype=torch.int8), torch.empty(scale_shape(tuple(X.shape), granularity))]
    addresses = [b.data_ptr() for b in buffers]

    store = specialise(piece.gm, [STORE], layouts, [0])
    assert equal(store.gm(x, w, *buffers), (x + attention,))
    assert equal(tuple(buffers), quantize(attention, granularity))
    assert [b.data_ptr() for b in buffers] == addresses

    reuse = specialise(piece.gm, [REUSE], layouts, [0])
    assert equal(reuse.gm(x, *buffers), (x + dequantize(*buffers, dtype),))


def test_heads_in_the_last_dimension_have_a_scale_each() -> None:
    def flat(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2) * 2

    inside = "scaled_dot_product_attention transpose flatten"
    piece = piece_of(flat, (inside, "flatten"))
    value = X.transpose(1, 2).flatten(2)
    layouts = [[exit_layout(value, CacheConfig(granularity="head"), 2, 1)]]
    q, scale = torch.empty(value.shape, dtype=torch.int8), torch.empty(1, 1, 2)
    exact = specialise(piece.gm, [STORE], layouts, [0]).gm(X, q, scale)[0] / 2
    assert equal((q, scale), quantize(exact, "head", num_heads=2))
    assert equal(specialise(piece.gm, [REUSE], layouts, [0]).gm(q, scale), (dequantize(q, scale) * 2,))


# -- in-place writes ------------------------------------------------------------------------------------------------


def test_a_reader_that_writes_into_the_value_gets_a_copy() -> None:
    def residual(x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(x, x, x)
        out.view(-1).mul_(2)
        return out + x

    piece = piece_of(residual, ("scaled_dot_product_attention", "scaled_dot_product_attention"))
    reuse = specialise(piece.gm, [REUSE], [[layout(NATIVE)]], [0])
    assert ops(reuse.gm)["clone"] == 1
    stored = torch.randn_like(X)
    before = stored.clone()
    assert equal(reuse.gm(X, stored), (before * 2 + X,))
    assert equal(stored, before)

    store = specialise(piece.gm, [STORE], [[layout(NATIVE)]], [0])
    assert equal(store.gm(X, stored), (residual(X),))
    assert equal(stored, F.scaled_dot_product_attention(X, X, X))  # as it was handed out, before the write


@pytest.mark.parametrize("through", [lambda a: a, lambda a: a.transpose(0, 1)], ids=["itself", "a view of it"])
def test_what_is_handed_out_of_the_piece_is_a_copy(through: Callable[[Tensor], Tensor]) -> None:
    def attention(x: Tensor) -> Tensor:
        return through(F.scaled_dot_product_attention(x, x, x))

    piece = piece_of(attention, ("scaled_dot_product_attention", "scaled_dot_product_attention"))
    stored = torch.randn_like(X)
    (result,) = specialise(piece.gm, [REUSE], [[layout(NATIVE)]], [0]).gm(stored)
    assert equal(result, through(stored))
    assert result.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr()


def test_what_nobody_writes_into_is_read_without_a_copy() -> None:
    assert "clone" not in ops(specialised(REUSE, NATIVE).gm)


def test_a_write_into_an_input_stays_when_the_attention_goes() -> None:
    def counts(x: Tensor, calls: Tensor) -> Tensor:
        calls.add_(1)
        return F.scaled_dot_product_attention(x, x, x) * 2

    attention = "scaled_dot_product_attention"
    piece = piece_of(counts, (attention, attention), examples=(X, torch.zeros(1)))
    reuse = specialise(piece.gm, [REUSE], [[layout(NATIVE)]], [0])
    calls = torch.zeros(1)
    reuse.gm(calls, X)
    assert calls == 1


# -- several guards, exits, outputs ---------------------------------------------------------------------------------


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    first = F.scaled_dot_product_attention(x, x, x)
    y = x + first
    second = F.scaled_dot_product_attention(y, y, y)
    return y + second * 2, second.sin()


TWO = (("scaled_dot_product_attention",) * 2, ("scaled_dot_product_attention_1",) * 2)


@pytest.mark.parametrize("second", Outcome)
@pytest.mark.parametrize("first", Outcome)
def test_two_guards_may_have_different_outcomes(first: Outcome, second: Outcome) -> None:
    piece = piece_of(two, *TWO)
    variant = specialise(piece.gm, [first, second], [[layout(NATIVE)]] * 2, [0, 1])
    used = []
    for guard, outcome in enumerate((first, second)):
        if outcome is REUSE or outcome in STORING:
            used.append((guard, 0))
        if outcome in COMPARING:
            used += [(guard, DIFFERENCE), (guard, LENT)]
    assert [(u.guard, u.exit) for u in variant.buffers] == used
    assert ops(variant.gm)["scaled_dot_product_attention"] == (first is not REUSE) + (second is not REUSE)

    def expected(
        stored: list[Tensor], lent: list[Tensor]
    ) -> tuple[tuple[Tensor, Tensor], list[Tensor], list[tuple[float, float]]]:
        a = stored[0] if first is REUSE else F.scaled_dot_product_attention(X, X, X)
        y = X + a
        b = stored[1] if second is REUSE else F.scaled_dot_product_attention(y, y, y)
        kept = [v if o in STORING else s for v, o, s in zip((a, b), (first, second), stored, strict=True)]
        apart = [float((v - other).norm() / v.norm()) for v, other in zip((a, b), lent, strict=True)]
        return (y + b * 2, b.sin()), kept, [(d, d) for d in apart]  # one sample: the mean is the largest

    buffers, lent, rows = [[torch.randn_like(X), torch.randn_like(X)] for _ in range(2)] + [list(torch.zeros(2, 2))]
    results, kept, differences = expected([b.clone() for b in buffers], [b.clone() for b in lent])
    given = {0: buffers, LENT: lent, DIFFERENCE: rows}
    stored = [given[u.exit][u.guard] for u in variant.buffers]
    assert equal(variant.gm(*([X] * len(variant.inputs)), *stored), results)
    assert equal(buffers, kept)
    for row, outcome, difference in zip(rows, (first, second), differences, strict=True):
        assert row.tolist() == pytest.approx(difference if outcome in COMPARING else (0.0, 0.0), rel=1e-5)


def test_what_only_compares_is_computed_even_if_nobody_reads_it() -> None:
    piece = piece_of(two, *TWO)
    variant = specialise(piece.gm, [Outcome.COMPARE, REUSE], [[layout(NATIVE)]] * 2, [1])
    assert ops(variant.gm) == {"scaled_dot_product_attention": 1, "change_of": 1, "copy_": 1, "sin": 1}


def test_a_stored_attention_is_computed_even_if_what_follows_reads_another() -> None:
    piece = piece_of(two, *TWO)
    variant = specialise(piece.gm, [STORE, REUSE], [[layout(NATIVE)]] * 2, [1])  # the first is only stored
    assert ops(variant.gm) == {"scaled_dot_product_attention": 1, "copy_": 1, "sin": 1}


def test_outputs_that_nobody_needs_are_dropped_with_what_only_they_need() -> None:
    piece = piece_of(two, *TWO)
    variant = specialise(piece.gm, [COMPUTE, REUSE], [[layout(NATIVE)]] * 2, [1])
    assert_expected_inline(
        readable(variant.gm),
        """\
input stored_0
sin = stored_0.sin()
return (sin,)""",
    )
    assert (variant.inputs, variant.outputs) == ((), (1,))


def test_each_exit_is_stored_by_itself() -> None:
    def joint(x: Tensor) -> Tensor:
        a, b = split(x)
        return a * b

    def split(x: Tensor) -> tuple[Any, Any]:
        out = F.scaled_dot_product_attention(x, x, x)
        return out[:, :, :2], out[:, :, 2:]

    piece = piece_of(joint, ("scaled_dot_product_attention getitem getitem_1", "getitem getitem_1"))
    layouts = [[layout(NATIVE), layout(INT8)]]
    store = specialise(piece.gm, [STORE], layouts, [0])
    assert store.buffers == (BufferUse(0, 0, 0), BufferUse(0, 1, 0), BufferUse(0, 1, 1))
    half = (1, 2, 2, 3)
    buffers = [torch.empty(half), torch.empty(half, dtype=torch.int8), torch.empty(1, 2, 2, 1)]
    assert equal(store.gm(X, *buffers), (joint(X),))
    reuse = specialise(piece.gm, [REUSE], layouts, [0])
    assert equal(reuse.gm(*buffers), (buffers[0] * dequantize(buffers[1], buffers[2]),))


def test_a_piece_without_guards_only_loses_dead_code() -> None:
    piece = piece_of(lambda x, y: (x + 1, y * 2), examples=(X, W))
    variant = specialise(piece.gm, [], [], [1])
    assert (ops(variant.gm), variant.inputs) == ({"mul": 1}, (1,))
    again = specialise(piece.gm, [], [], [0, 1])
    assert readable(again.gm) == readable(piece.gm)  # nothing to do


# -- how an exit is stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "granularity", "heads", "expected"),
    [
        ((2, 5, 8), "token", 4, ("token", None)),
        ((2, 5, 8), "tensor", 4, ("tensor", None)),
        ((2, 5, 8), "channel", 4, ("channel", None)),
        ((2, 5, 8), "head", 4, ("head", 4)),
        ((2, 5, 8), "head", 3, ("token", None)),  # heads do not divide the channels
        ((2, 5, 8), "head", None, ("token", None)),
        ((2, 4, 5, 8), "head", 4, ("head", None)),
        ((2, 5, 4, 8), "head", 4, ("token", None)),  # the heads are elsewhere
        ((5, 2, 8), "tensor", 4, ("token", None)),  # sequence first: a scale over tokens would span samples
        ((5, 2, 8), "channel", 4, ("token", None)),
        ((10, 8), "tensor", 4, ("token", None)),  # batch and tokens in one dimension
    ],
)
def test_a_scale_never_spans_samples(
    shape: tuple[int, ...], granularity: str, heads: int | None, expected: object
) -> None:
    found = exit_layout(torch.empty(shape), CacheConfig(granularity=granularity), heads, 2)
    assert (found.granularity, found.num_heads) == expected
    assert found.parts == 2
    assert exit_layout(torch.empty(shape), CacheConfig(dtype="native"), heads, 2).parts == 1


# -- a real model ---------------------------------------------------------------------------------------------------


def dit_block(outcome: Outcome) -> tuple[fx.GraphModule, Variant]:
    gm, _ = captured_model("dit")
    regions = find_sites(gm)
    piece = partition(guard_sites(gm, regions), regions)[2]
    assert piece.label == "transformer_blocks.1"
    like = next(n for n in gm.graph.nodes if n.name in regions[1].exits).meta["example_value"]
    return piece.gm, specialise(piece.gm, [outcome], [[exit_layout(like, INT8, 2, 1)]], range(len(piece.outputs)))


def test_a_reused_dit_block_computes_nothing_that_only_the_attention_needed() -> None:
    gm, variant = dit_block(REUSE)
    before, after = ops(gm), ops(variant.gm)
    assert after["scaled_dot_product_attention"] == 0
    assert before["linear"] - after["linear"] == 4  # Q, K, V and out
    assert before["layer_norm"] - after["layer_norm"] == 1
    assert after["reuse_or_compute"] == after["copy_"] == 0
    assert len(variant.inputs) < sum(n.op == "placeholder" for n in gm.graph.nodes)


def test_a_dit_block_stores_where_it_is_told_to() -> None:
    gm, computing = dit_block(COMPUTE)
    _, storing = dit_block(STORE)
    assert ops(gm) - ops(computing.gm) == {"reuse_or_compute": 1, "getitem": 1}
    assert not ops(computing.gm) - ops(gm)
    assert ops(storing.gm)["copy_"] == 2
    assert ops(computing.gm)["copy_"] == 0
