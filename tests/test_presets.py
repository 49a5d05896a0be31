"""DQAR's ablations: each decides otherwise."""

from __future__ import annotations

import itertools

import pytest
from diffusers import DDIMScheduler

import dqar_fx
from dqar_fx.presets import PRESETS
from tests.models import make_dit, sample

STEPS = 12


def decisions(name: str) -> list[tuple[str, str]]:
    model = dqar_fx.optimize(make_dit(4), **dqar_fx.preset(name, STEPS), backend="eager")
    sample(model, steps=STEPS)
    return [(d.action, d.reason) for d in dqar_fx.runtime(model).stats.decisions]


def test_no_two_presets_decide_alike() -> None:
    found = {name: decisions(name) for name in PRESETS}
    for one, other in itertools.combinations(PRESETS, 2):
        assert found[one] != found[other], (one, other)
    assert {action for action, _ in found["baseline"]} == {"compute"}
    assert sum(action == "reuse" for action, _ in found["quant_cache_only"]) == 4 * (STEPS - 1)
    assert "entropy" in {reason for _, reason in found["entropy_gate_only"]}  # 2 nats of at most ln 16 = 2.77


def test_full_dqar_asks_the_scheduler_where_there_is_one() -> None:
    model = dqar_fx.optimize(make_dit(1), **dqar_fx.preset("full_dqar"), scheduler=DDIMScheduler(), backend="eager")
    assert "SnrGate" in str(dqar_fx.runtime(model)._gating)


def test_an_unknown_name() -> None:
    with pytest.raises(dqar_fx.ScheduleError, match=r"no preset 'ful_dqar'\. Use one of baseline"):
        dqar_fx.preset("ful_dqar")
