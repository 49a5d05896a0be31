"""Other resolutions and batch sizes: what they cost, and that nothing is mixed up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dqar_fx
from tests.families import FLUX, NOTHING, SD3, WAN, Family, assert_planned

SHAPES: list[dict[str, int]] = [{}, {"size": 12}, {"size": 16}, {"batch": 3}, {"batch": 4, "size": 12}, {}]


def eager(family: Family, shape: dict[str, int]) -> Tensor:
    return family.sample(family.make(), **shape)  # type: ignore[arg-type]


# As given, any size, any batch. SD3 crops its position table, and Dynamo guards on an offset of zero (size 16).
@pytest.mark.parametrize(("family", "most"), [(SD3, 4), (FLUX, 3), (WAN, 3)], ids=["SD3", "Flux", "Wan"])
def test_every_shape_is_the_eager_model_and_costs_at_most_one_more_capture(family: Family, most: int) -> None:
    model = family.optimized(NOTHING)
    captures = 0
    for shape in SHAPES:
        assert torch.equal(family.sample(model, **shape), eager(family, shape)), shape  # type: ignore[arg-type]
        now = dqar_fx.runtime(model).stats.captures
        assert now <= captures + 1, shape
        captures = now
    assert captures <= most


def reusing(dynamic: bool | None) -> tuple[Any, dict[str, Tensor]]:
    """A model that has sampled every shape, and what it gave for each."""
    model = FLUX.optimized(dynamic=dynamic)
    results = {}
    for shape in SHAPES:
        results[str(shape)] = FLUX.sample(model, **shape)  # type: ignore[arg-type]
        assert_planned(model, FLUX.sites)
    return model, results


@pytest.fixture(scope="module")
def fresh() -> dict[str, Tensor]:
    """What a model gives for each shape that has never seen another."""
    return {str(s): FLUX.sample(FLUX.optimized(dynamic=False), **s) for s in SHAPES[:-1]}  # type: ignore[arg-type]


def test_every_shape_reuses_as_a_fresh_model_does(fresh: dict[str, Tensor]) -> None:
    model, results = reusing(None)
    assert all(torch.equal(results[shape], fresh[shape]) for shape in fresh)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in SHAPES:
            assert torch.equal(FLUX.sample(model, **shape), fresh[str(shape)]), shape  # type: ignore[arg-type]


def test_with_dynamic_shapes_one_capture_serves_all(fresh: dict[str, Tensor]) -> None:
    model, results = reusing(True)
    assert dqar_fx.runtime(model).stats.captures == 1
    assert all(torch.equal(results[shape], fresh[shape]) for shape in fresh)


def test_with_dynamic_shapes_a_third_size_compiles_nothing() -> None:
    model = FLUX.optimized(dynamic=True)
    FLUX.sample(model)
    FLUX.sample(model, size=12)
    variants = dqar_fx.runtime(model).stats.variants
    FLUX.sample(model, size=16)
    FLUX.sample(model, size=20, batch=3)
    assert_planned(model, FLUX.sites)
    assert dqar_fx.runtime(model).stats.variants == variants
