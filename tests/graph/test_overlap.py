"""Pieces are lowered while C++ compilers work on those before; what comes of it is the same."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache

import dqar_fx
from dqar_fx import Schedule
from dqar_fx.graph.looks import intermediate_looks
from dqar_fx.graph.lower import Lowerer, resolve_backend
from dqar_fx.graph.overlap import RUNS_AT_ONCE, overlapping
from tests.families import DIT, FLUX, SD3, WAN, Family
from tests.models import NUM_STEPS, make_dit, sample

SCHEDULE = Schedule.interval(NUM_STEPS, every=2, warmup=1)


@pytest.fixture(autouse=True)
def usual_settings() -> Iterator[None]:
    """Whatever else in this process has set."""
    with torch._inductor.config.patch(dict.fromkeys((n for n in RUNS_AT_ONCE if hasattr(config, n)), False)):
        yield


@pytest.fixture
def fresh_inductor(fresh_inference: None) -> Iterator[None]:
    with fresh_cache():
        yield


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens from here on: pieces are lowered, and waited for."""
    events: list[str] = []
    lower, wait = Lowerer._compile, AsyncCompile._wait_futures

    def lowering(self: Lowerer, *args: Any, **kwargs: Any) -> Any:
        events.append("lower")
        return lower(self, *args, **kwargs)

    def waiting(self: AsyncCompile, scope: dict[str, Any]) -> None:
        events.append("wait")
        wait(self, scope)

    monkeypatch.setattr(Lowerer, "_compile", lowering)
    monkeypatch.setattr(AsyncCompile, "_wait_futures", waiting)
    return events


@pytest.mark.filterwarnings("ignore:.*use_cpp_pybinding")
def test_nothing_is_waited_for_before_all_pieces_of_a_step_are_lowered(
    fresh_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_dit()
    dqar_fx.optimize(model, SCHEDULE)
    events = recorded(monkeypatch)
    with torch._inductor.config.patch(compile_threads=2):
        found = sample(model, steps=2)
    pieces = dqar_fx.runtime(model).stats.variants
    assert events.count("lower") == pieces > 4, "a piece was compiled twice"
    first = events.index("wait")
    assert first >= 3, events
    assert events[first : 2 * first] == ["wait"] * first, events
    expected = sample(make_dit(), steps=2)
    torch.testing.assert_close(found[:1], expected[:1])
    assert AsyncCompile.wait.__qualname__ == "AsyncCompile.wait", "torch is not as it was"


def test_inductor_is_waited_for_where_it_runs_what_it_compiles() -> None:
    def overlaps(**options: Any) -> bool:
        mode, backend = options.pop("mode", None), options.pop("backend", "inductor")
        return Lowerer(resolve_backend(backend, mode, options or None)).overlaps

    assert overlaps()
    assert not overlaps(mode="max-autotune-no-cudagraphs")
    assert not overlaps(freezing=True)
    assert not overlaps(backend="eager")
    with torch._inductor.config.patch(cpp_wrapper=True):
        assert not overlaps()


def test_other_threads_wait_as_ever() -> None:
    scopes: list[str] = []

    class Compilers(AsyncCompile):
        def _wait_futures(self, scope: dict[str, Any]) -> None:
            scopes.append(scope["name"])

    with torch._inductor.config.patch(compile_threads=2), overlapping():
        Compilers().wait({"name": "mine"})
        other = threading.Thread(target=lambda: Compilers().wait({"name": "another's"}))
        other.start()
        other.join()
        assert scopes == ["another's"]
    assert scopes == ["another's", "mine"]


def test_what_was_put_off_is_waited_for_when_lowering_fails() -> None:
    waited: list[bool] = []

    class Compilers(AsyncCompile):
        def _wait_futures(self, scope: dict[str, Any]) -> None:
            waited.append(True)

    with torch._inductor.config.patch(compile_threads=2):
        with contextlib.suppress(KeyError), overlapping():
            Compilers().wait({})
            raise KeyError
        assert waited == [True]
        Compilers().wait({})
        assert len(waited) == 2


@pytest.mark.parametrize("family", [DIT, SD3, FLUX, WAN], ids=["DiT", "SD3", "Flux", "Wan"])
def test_values_between_pieces_look_as_they_were_told(
    family: Family, fresh_inference: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = family.optimized()
    expected = family.sample(usual)
    monkeypatch.setattr(Lowerer, "overlaps", property(lambda _: True))
    together = family.optimized()
    assert torch.equal(family.sample(together), expected)
    assert dqar_fx.runtime(together).stats.variants == dqar_fx.runtime(usual).stats.variants


def test_a_piece_that_asks_for_values_ends_what_can_be_told() -> None:
    def graph(function: Any) -> Any:
        return torch.fx.symbolic_trace(function)

    pieces = [
        (graph(lambda x: (x.t(), x + 1)), (0,), (2, 3)),
        (graph(lambda x, y: (x @ y,)), (1, 2), (4,)),
        (graph(lambda x: (x.nonzero(),)), (4,), (5,)),
        (graph(lambda x: (x,)), (5,), (6,)),
    ]
    found = list(intermediate_looks(pieces, [torch.zeros(2, 3), torch.zeros(4, 3)]))
    assert [sorted(each) for each in found] == [[], [2], [4]]
    made = found[1][2]()
    assert (made.shape, made.stride()) == ((3, 2), (1, 3))
    assert found[2][4]().shape == (4, 2)
