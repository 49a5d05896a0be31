"""Each specialised piece is compiled once for each kind of input, with whatever backend."""

from __future__ import annotations

import io
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch.nn.attention.flex_attention import flex_attention

import dqar_fx
from dqar_fx import Schedule
from dqar_fx.graph.capture import readable
from dqar_fx.graph.lower import Lowerer, resolve_backend, signature
from dqar_fx.graph.specialise import Variant
from tests.graph.conftest import capture_call, equal, ops, traced
from tests.models import NUM_STEPS, make_dit, sample


class Counting:
    """A user's backend that remembers what it was given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        assert len(example_inputs) == sum(n.op == "placeholder" for n in gm.graph.nodes)
        return gm.forward


def variant(function: Callable[..., Any], *examples: Any) -> Variant:
    gm = traced(function, *examples)
    return Variant(gm, tuple(range(len(examples))), (), (0,))


def double(x: Tensor) -> tuple[Tensor]:
    return (x.sin() * 2,)


X = torch.randn(3, 4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_backends_by_name(backend: str) -> None:
    lowered = Lowerer(resolve_backend(backend)).lower(variant(double, X), [X])
    (result,) = lowered([X])
    torch.testing.assert_close(result, double(X)[0])


def test_a_callable_is_a_backend_and_is_asked_once() -> None:
    backend = Counting()
    lowerer, one = Lowerer(resolve_backend(backend)), variant(double, X)
    text = readable(one.gm)
    first = lowerer.lower(one, [X])
    assert lowerer.lower(one, [torch.ones(3, 4)]) is first
    assert (len(backend.graphs), lowerer.count) == (1, 1)
    assert equal(first([X]), double(X))
    assert backend.graphs[0] is not one.gm
    assert readable(one.gm) == text  # the input is untouched
    assert all("example_value" in n.meta for n in one.gm.graph.nodes)
    assert all(n.meta.get("example_value") is None for n in backend.graphs[0].graph.nodes)
    assert lowerer.seconds > 0


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(4, 4),
        torch.randn(4, 3).t(),
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(3, 4, requires_grad=True),
        torch.nn.Parameter(X, requires_grad=False),
        torch.empty(3, 4, device="meta"),
    ],
    ids=["shape", "strides", "dtype", "requires_grad", "type", "device"],
)
def test_another_kind_of_input_is_compiled_anew(other: Tensor) -> None:
    backend = Counting()
    lowerer, one = Lowerer(backend), variant(double, X)
    assert lowerer.lower(one, [X]) is not lowerer.lower(one, [other])
    assert lowerer.lower(one, [other]) is lowerer.lower(one, [other])
    assert len(backend.graphs) == 2


def test_another_variant_is_compiled_anew() -> None:
    backend = Counting()
    lowerer = Lowerer(backend)
    assert lowerer.lower(variant(double, X), [X]) is not lowerer.lower(variant(double, X), [X])
    assert len(backend.graphs) == 2


def test_modes_are_part_of_the_signature() -> None:
    plain = signature([X])
    with torch.inference_mode():
        assert signature([X]) != plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = signature([X])
        assert autocast != plain
    with torch.autocast("cpu", dtype=torch.float16):
        assert signature([X]) not in (plain, autocast)
    with torch.autocast("cuda", enabled=False):
        assert signature([X]) == plain
    with torch.inference_mode():
        born_there = torch.ones(3, 4)
    assert signature([born_there]) != plain


def test_numbers_are_written_into_the_graph_and_told_apart() -> None:
    def scaled(n: int, x: Tensor, m: int) -> tuple[Any, ...]:
        return x[:, :n].reshape((m, -1)) * n, m

    backend = Counting()
    lowerer, one = Lowerer(backend), variant(scaled, 2, X, 6)
    two, three = lowerer.lower(one, [2, X, 6]), lowerer.lower(one, [2, X, 3])
    assert [ops(gm) for gm in backend.graphs] == [ops(one.gm)] * 2
    assert all([n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x"] for gm in backend.graphs)
    assert two([2, X, 6])[1] == 6
    assert equal(two([2, X, 6])[0], scaled(2, X, 6)[0])
    assert equal(three([2, X, 3])[0], scaled(2, X, 3)[0])
    assert lowerer.lower(one, [2, X, 6]) is two
    assert signature([1]) != signature([True])


def test_options_reach_the_backend() -> None:
    seen: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any]) -> Callable[..., Any]:
        seen.update(options)
        return gm.forward

    Lowerer(resolve_backend(backend, options={"level": 3})).lower(variant(double, X), [X])
    assert seen == {"level": 3}
    with pytest.raises(RuntimeError, match="no_such_option"):
        resolve_backend("inductor", options={"no_such_option": 1})
    with pytest.raises(RuntimeError, match="no such mode"):
        resolve_backend("inductor", mode="no such mode")


class Screen(io.StringIO):
    """Standard error that is a terminal, or is not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_says_what_is_compiled(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, seen = Screen(terminal=terminal), []

    def backend(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(screen.getvalue().split("\r")[-1])
        return gm.forward

    monkeypatch.setattr(sys, "stderr", screen)
    lowerer, one = Lowerer(backend), variant(double, X)
    for value in (X, X, torch.ones(1)):
        lowerer.lower(one, [value])
    first, second = "\x1b[Kdqar_fx: compiling piece 1 ...", "\x1b[Kdqar_fx: compiling piece 2, 0 s so far ..."
    assert seen == ([first, second] if terminal else ["", ""])
    assert screen.getvalue().endswith("\r\x1b[K" if terminal else "")  # nothing is left of it
    assert lowerer.count == 2


def test_threads_that_need_the_same_piece_compile_it_once() -> None:
    started, backend = threading.Barrier(4), Counting()

    def slow(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        threading.Event().wait(0.05)
        return backend(gm, example_inputs)

    lowerer, one, results = Lowerer(slow), variant(double, X), []

    def work() -> None:
        started.wait()
        results.append(lowerer.lower(one, [X]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(backend.graphs) == lowerer.count == 1
    assert len(set(results)) == 1


def test_a_failed_compilation_is_tried_again() -> None:
    attempts: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("out of memory")
        return gm.forward

    lowerer, one = Lowerer(backend), variant(double, X)
    with pytest.raises(RuntimeError, match="out of memory"):
        lowerer.lower(one, [X])
    assert lowerer.count == 0
    assert equal(lowerer.lower(one, [X])([X]), double(X))


# -- boxed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_boxed_function_frees_its_arguments_while_it_runs(backend: str) -> None:
    lowered = Lowerer(resolve_backend(backend)).lower(variant(double, X), [X])
    arguments = [torch.randn(3, 4)]
    alive = weakref.ref(arguments[0])
    expected = double(arguments[0])[0]
    (result,) = lowered(arguments)
    assert arguments == []
    assert alive() is None
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_higher_order_operator_keeps_its_body(backend: str) -> None:
    linear = torch.nn.Linear(4, 4)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(linear, x, use_reentrant=False)

    gm, inputs = capture_call(checkpointed, X)
    piece = Variant(gm, tuple(range(len(inputs))), (), (0,))
    (result,) = Lowerer(resolve_backend(backend)).lower(piece, list(inputs))(list(inputs))
    assert equal(result, linear(X))


def flexible(x: Tensor) -> Tensor:
    q = x[None, None]
    return flex_attention(q, q, q, score_mod=lambda score, _b, _h, i, j: score + (i - j))[0, 0] * x.shape[0]


def test_what_dynamo_cannot_trace_again_is_compiled_for_each_size() -> None:
    gm, inputs = capture_call(flexible, X, dynamic=True)
    piece = Variant(gm, tuple(range(len(inputs))), (), (0,))
    lowerer = Lowerer(resolve_backend("eager"), dynamic=True)
    for rows, count in ((3, 1), (5, 2), (3, 2), (7, 3)):
        x = torch.randn(rows, 4)
        given = [x if isinstance(a, Tensor) else (rows if a == 3 else a) for a in inputs]
        (result,) = lowerer.lower(piece, given)(list(given))
        torch.testing.assert_close(result, torch.compile(flexible, backend="eager")(x))
        assert lowerer.count == count


def test_all_sizes_share_one_compilation_where_dynamo_can_trace() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x.sin() * x.shape[0]

    gm, inputs = capture_call(scaled, X, dynamic=True)
    backend = Counting()
    lowerer = Lowerer(resolve_backend(backend), dynamic=True)
    piece = Variant(gm, tuple(range(len(inputs))), (), (0,))
    for rows in (3, 5, 7):
        x = torch.randn(rows, 4)
        given = [x if isinstance(a, Tensor) else (rows if a == 3 else a) for a in inputs]
        (result,) = lowerer.lower(piece, given)(list(given))
        assert equal(result, scaled(x))
    assert len(backend.graphs) == lowerer.count == 1


def test_pieces_are_compiled_for_the_sizes_they_are_given() -> None:
    """Inductor makes open sizes of real tensors' wherever there is a shape environment: twice the time to compile."""
    sizes: list[object] = []

    def watch(self: GraphLowering, gm: fx.GraphModule, *args: Any, **kwargs: Any) -> None:
        values = [n.meta["val"] for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        sizes.extend(size for value in values for size in (*value.shape, *value.stride()))
        start(self, gm, *args, **kwargs)

    start = GraphLowering.__init__
    with fresh_cache(), mock.patch.object(GraphLowering, "__init__", watch):
        lowered = Lowerer(resolve_backend("inductor")).lower(variant(double, X), [X])
    torch.testing.assert_close(lowered([X])[0], double(X)[0])
    assert {3, 4} <= set(sizes)
    assert all(type(size) is int for size in sizes)


def test_a_second_process_finds_every_piece_on_disk() -> None:
    """The caches on disk are keyed by what is compiled, so that a new capture in this process tells the same."""
    found = []
    with fresh_cache(), torch._inductor.config.patch(fx_graph_cache=True):
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            model = dqar_fx.optimize(make_dit(layers=3), Schedule.interval(NUM_STEPS, every=3, warmup=2), dynamic=False)
            sample(model)
            aot, inductor = counters["aot_autograd"], counters["inductor"]
            names = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
            found.append(tuple(aot[name] for name in names))
            assert inductor["fxgraph_cache_bypass"] == 0
            pieces = dqar_fx.runtime(model).stats.variants
    assert found == [(0, pieces, 0), (pieces, 0, 0)]
