"""The zoo's harness for stored keys and values: against an eager model whose attentions are given the stored ones."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention

import dqar_fx
from dqar_fx import CacheConfig, Schedule, dequantize, quantize
from tests.zoo import case as harness
from tests.zoo.case import NUM_STEPS, Case

ODD_STEPS = Schedule.custom(NUM_STEPS, lambda step, *_: step % 2 == 1)


class KeysAndValues:
    """The oracle: at odd steps every attention operator gets the keys and values that it got at the step before.

    Args:
        stored: what a tensor is after it was stored and read back.
    """

    def __init__(self, stored: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.calls = 0
        self._stored = stored
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._step = 0

    @contextmanager
    def generation(self, num_steps: int) -> Iterator[None]:
        """While the model runs: every attention operator is watched."""
        assert num_steps == NUM_STEPS
        with ExitStack() as watched:
            for module, name in ((F, "scaled_dot_product_attention"), (flex_attention, "flex_attention")):
                operator = functools.partial(self._attend, getattr(module, name))
                watched.enter_context(mock.patch.object(module, name, operator))
            yield

    def begin_step(self, step: int) -> None:
        """The next evaluation is step ``step``."""
        self._step, self.calls = step, 0
        if step % 2 == 0:
            self._pairs = []

    def _attend(
        self, operator: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self._step % 2 == 0:
            self._pairs.append((self._stored(key), self._stored(value)))
        else:
            key, value = self._pairs[self.calls]
        self.calls += 1
        return operator(query, key, value, *args, **kwargs)


def check_keys_and_values(case: Case, sites: int) -> None:
    """Nothing reused is the eager model; every second step reused is the oracle; both to the bit. INT8 is near it."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what diffusers and torch will change some day
        warnings.filterwarnings("error", ".*every attention comput")
        model = harness.build(case)
        eager = harness._run(model, case)
        exact, coarse = KeysAndValues(), KeysAndValues(lambda x: dequantize(*quantize(x), x.dtype))
        expected = harness._run(model, case, exact)
        near = harness._run(model, case, coarse)
        try:
            for dtype, oracle in (("native", expected), ("int8", near)):
                reusing = dqar_fx.optimize(
                    copy.deepcopy(model), ODD_STEPS, cache=CacheConfig("kv", dtype, lossless=False), backend="eager"
                )
                runtime = dqar_fx.runtime(reusing)
                found = harness._run(reusing, case, runtime)
                assert len(runtime.sites) == sites == exact.calls, runtime.report()
                assert runtime.stats.captures == case.breaks + 1, runtime.report()
                half = len(found) // NUM_STEPS
                harness._same(found[:half], eager[:half], "the step that computes, against eager")
                if dtype == "native":
                    harness._same(found, oracle, "reused at odd steps, against the replay")
                    assert any(not torch.equal(a, b) for a, b in zip(found, eager, strict=True))
                for mine, theirs in zip(found, oracle, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))
                assert runtime.stats.reused == sites * NUM_STEPS // 2
                harness._same(harness._run(reusing, case), found, "once more, by the timestep alone")
                assert runtime.stats.captures == len(runtime.report().pieces)
        finally:
            torch._dynamo.reset()
