"""The benchmark of one step: who is called when."""

from __future__ import annotations

from functools import partial

import overhead
import torch


def test_contenders_take_turns_in_bursts_and_the_cases_of_one_model_within() -> None:
    called: list[str] = []

    def call(case: str) -> torch.Tensor:
        called.append(case)
        return torch.zeros(())

    cases = ("none", *overhead.TOGETHER, "ideal")
    times = overhead.in_bursts({case: partial(call, case) for case in cases}, 3, 2, torch.device("cpu"))
    stored, reused = overhead.TOGETHER
    assert called == [
        *("none", "none", "ideal", "ideal", stored, reused, stored, reused),
        *("none", "ideal", stored, reused),
    ]
    assert {case: len(found) for case, found in times.items()} == dict.fromkeys(cases, 3)
