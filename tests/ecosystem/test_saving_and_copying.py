"""Files, state, copies and pickles of an optimised model are those of a model that never was."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import dqar_fx
from dqar_fx import RuntimeStateError, Schedule
from tests.families import FLUX, NUM_STEPS, assert_planned, computed

ALWAYS = Schedule.always(NUM_STEPS)


@pytest.fixture(scope="module")
def model() -> Any:
    """Optimised, sampled from, never changed."""
    made = FLUX.optimized()
    FLUX.sample(made)
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saved_files_are_identical_and_load(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "optimised")
    FLUX.make().save_pretrained(tmp_path / "plain")
    saved = files(tmp_path / "optimised")
    assert saved == files(tmp_path / "plain")
    assert len(saved) == 2
    loaded = FLUX.kind.from_pretrained(tmp_path / "optimised")
    assert torch.equal(FLUX.sample(loaded), FLUX.sample(FLUX.make()))
    with pytest.raises(RuntimeStateError, match="not optimised"):
        dqar_fx.runtime(loaded)


def test_a_loaded_model_can_be_optimised(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = FLUX.kind.from_pretrained(tmp_path)
    runtime = dqar_fx.runtime(model)
    dqar_fx.optimize(loaded, runtime.schedule, cache=runtime.cache, backend="eager")
    assert torch.equal(FLUX.sample(loaded), FLUX.sample(model))


def test_state_and_names_are_those_of_the_plain_model(model: Any) -> None:
    plain = FLUX.make()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert type(model) is type(plain)
    assert repr(model) == repr(plain)
    assert (model.dtype, model.device) == (plain.dtype, plain.device)


def test_a_loaded_state_drops_what_is_stored() -> None:
    model, other = FLUX.optimized(ALWAYS), FLUX.make(seed=1)
    for step in range(2):
        FLUX.call(model, step)
    assert not computed(model, 1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(FLUX.call(model, 2), FLUX.call(other, 2))
    assert computed(model, 2)
    FLUX.call(model, 3)
    assert not computed(model, 3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_in_the_middle_is_plain_and_disturbs_nothing(model: Any, how: str) -> None:
    def copied() -> Any:
        if how == "deepcopy":
            return copy.deepcopy(model)
        if how == "pickle":
            return pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    expected = FLUX.sample(model)
    copies: list[Any] = []

    def between(step: int) -> None:
        copies.append(copied())
        FLUX.call(copies[-1], step)

    captures = dqar_fx.runtime(model).stats.captures
    assert torch.equal(FLUX.sample(model, between=between), expected)
    assert_planned(model, FLUX.sites)
    assert dqar_fx.runtime(model).stats.captures == captures
    assert torch.equal(FLUX.sample(copies[2]), FLUX.sample(FLUX.make()))
    with pytest.raises(RuntimeStateError, match="not optimised"):
        dqar_fx.runtime(copies[2])
    dqar_fx.optimize(copies[2], dqar_fx.runtime(model).schedule, cache=dqar_fx.runtime(model).cache, backend="eager")
    assert torch.equal(FLUX.sample(copies[2]), expected)


def test_restored_is_as_it_was_to_the_last_attribute() -> None:
    model = FLUX.make()
    before = dict(vars(model))
    dqar_fx.optimize(model, ALWAYS, backend="eager")
    assert vars(model).keys() != before.keys()
    FLUX.call(model, 0)
    dqar_fx.restore(model)
    after = {k: v for k, v in vars(model).items() if k != "_compiled_call_impl"}  # None, as in the class
    assert after == before
    assert model._compiled_call_impl is None
