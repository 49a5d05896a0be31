"""Compiled pieces are called as directly as is sound, and not more so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.utils import fresh_cache

import dqar_fx
from dqar_fx import Schedule
from dqar_fx.graph.calling import boxed, direct, needs_nothing_around
from tests.models import NUM_STEPS, make_dit, sample

X, Y = torch.randn(3, 4), torch.randn(3, 4)


def test_a_plain_function_is_called_with_its_arguments() -> None:
    assert boxed(lambda x, y: (x - y,))([3, 1]) == (2,)

    def boxed_by_name(x: int, y: int) -> tuple[int]:
        return (x - y,)

    boxed_by_name._boxed_call = True  # type: ignore[attr-defined]  # a name is not enough: it takes two arguments
    assert boxed(boxed_by_name)([3, 1]) == (2,)

    def wrapper(*args: int) -> tuple[int, ...]:
        return args

    wrapper.__wrapped__ = boxed_by_name  # type: ignore[attr-defined]
    assert boxed(wrapper)([3, 1]) == (3, 1)


def test_a_boxed_function_behind_wrappers_is_found() -> None:
    def inner(arguments: list[int]) -> tuple[int, ...]:
        taken = tuple(arguments)
        arguments.clear()
        return taken

    inner._boxed_call = True  # type: ignore[attr-defined]

    def middle(*args: int) -> tuple[int, ...]:
        return inner(list(args))

    def outer(*args: int) -> tuple[int, ...]:
        return middle(*args)

    middle.__wrapped__, outer.__wrapped__ = inner, middle  # type: ignore[attr-defined]
    assert boxed(outer) is inner


# -- what needs nothing around it -----------------------------------------------------------------------------------


def own(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x * 2 + y, y.sin()


def returns_argument(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x + y, y


def returns_view_of_argument(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x + y, y[0]


def returns_the_same_twice(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = x + y
    return z, z.t()


def returns_a_number(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    return x + y, 3


def writes_first(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x.add_(1)
    return (x * y,)


def writes_last(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    y.copy_(x * 2)
    return (x + 1,)


def fails(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x @ y,)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (own, True), (returns_argument, False), (returns_view_of_argument, False), (returns_the_same_twice, False),
        (returns_a_number, False), (writes_first, False), (writes_last, True), (fails, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_what_generated_code_does_alone(
    function: Callable[..., tuple[Any, ...]], expected: bool, inference: bool
) -> None:
    with torch.inference_mode(inference):
        x, y = X.clone(), Y.clone()
        assert needs_nothing_around(fx.symbolic_trace(function), [x, y], may_write=1) == expected
        assert torch.equal(x, X)  # nothing has run
        assert torch.equal(y, Y)


def test_who_may_be_written_into() -> None:
    gm = fx.symbolic_trace(writes_last)
    assert needs_nothing_around(gm, [X, Y], may_write=1)
    assert not needs_nothing_around(gm, [X, Y], may_write=2)


def test_arguments_that_are_prepared() -> None:
    gm = fx.symbolic_trace(own)
    assert needs_nothing_around(gm, [torch.nn.Parameter(X), Y], 2)
    assert not needs_nothing_around(gm, [X, X], 2)
    assert not needs_nothing_around(gm, [X, X.as_subclass(Subclass)], 2)
    assert not needs_nothing_around(gm, [X, 3], 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not needs_nothing_around(gm, [X, Y], 2)


class Subclass(torch.Tensor):
    """Of a kind of its own."""


# -- the code itself ------------------------------------------------------------------------------------------------


def test_the_code_is_found_if_it_returns_as_much() -> None:
    gm = fx.symbolic_trace(own)
    function = torch._TorchCompileInductorWrapper("default", {}, False)(gm, [X, Y])
    code = direct(function, 2)
    assert code is not None
    for found, expected in zip(code([X, Y]), own(X, Y), strict=True):
        torch.testing.assert_close(found, expected)
    assert direct(function, 1) is None
    assert direct(gm.forward, 2) is None


def test_after_its_first_run_a_step_calls_generated_code_only() -> None:
    calls = []
    original = CompiledFxGraph.__call__

    def counted(self: CompiledFxGraph, inputs: Any) -> Any:
        calls.append(self)
        return original(self, inputs)

    found = []
    with fresh_cache(), mock.patch.object(CompiledFxGraph, "__call__", counted):
        for disk in (True, True, False):  # to the cache on disk, from there (which is wrapped otherwise), and without
            torch._dynamo.reset()
            model = dqar_fx.optimize(make_dit(), Schedule.interval(NUM_STEPS, every=2, warmup=1))
            with torch._inductor.config.patch(fx_graph_cache=disk):
                found.append(sample(model))
                assert calls
                calls.clear()
                assert torch.equal(sample(model), found[0])
            assert not calls
            compiled = dqar_fx.runtime(model).lowerer._compiled.values()
            assert all(getattr(function, "_boxed_call", False) for function in compiled)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
