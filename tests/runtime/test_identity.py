"""Steps are read off timesteps and schedulers, without touching the device where a scheduler is given."""

import copy
import inspect
import pickle

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

from dqar_fx.runtime.identity import SchedulerIdentity, read_timestep, timestep_argument


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["hidden_states", "timestep", "class_labels"], ("timestep", 1)),
        (["x", "t", "cap_feats"], ("t", 1)),
        (["hidden_states", "timesteps"], ("timesteps", 1)),
        (["decoder_input_tokens", "decoder_noise_time"], ("decoder_noise_time", 1)),
        (["x", "y"], None),
    ],
)
def test_the_timestep_is_found_by_its_name(names: list[str], expected: object) -> None:
    assert timestep_argument(names) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(7), 7.0),
        (torch.tensor([7, 7]), 7.0),
        (torch.tensor([7.5, 8.0]), (7.5, 8.0)),
        (torch.tensor([]), None),
        (3, 3.0),
        (0.25, 0.25),
        (True, None),
        ("7", None),
        (None, None),
    ],
)
def test_a_timestep_is_read_as_a_number(value: object, expected: object) -> None:
    assert read_timestep(value) == expected


class CountsReads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


SCHEDULERS = [
    DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler, UniPCMultistepScheduler,
]  # fmt: skip


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["as it is", "divided"])
def test_a_scheduler_gives_every_position_without_reading_a_tensor(kind: type, scaled: bool) -> None:
    scheduler = kind()
    scheduler.set_timesteps(5)
    identity = SchedulerIdentity(scheduler)
    latent = torch.randn(1, 4, 8, 8)
    positions, reads = [], CountsReads()
    for t in scheduler.timesteps:
        given = (t / 1000 if scaled else t).expand(2)
        with reads:
            positions.append(identity.position(given))
        latent = scheduler.step(torch.randn_like(latent), t, latent).prev_sample
    assert reads.reads == 0
    assert identity.num_steps == len(scheduler.timesteps)
    assert positions == list(range(len(scheduler.timesteps)))


def test_a_watched_scheduler_is_left_as_it_was() -> None:
    scheduler = DDIMScheduler()
    before = inspect.signature(scheduler.step), dict(vars(scheduler))
    identity = SchedulerIdentity(scheduler)
    assert inspect.signature(scheduler.step) == before[0]  # pipelines look at it
    identity.release()
    assert vars(scheduler) == before[1]


def test_a_copy_of_a_watched_scheduler_steps_itself() -> None:
    scheduler = DDIMScheduler()
    identity = SchedulerIdentity(scheduler)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        other.set_timesteps(3)
        assert other.step.__self__ is other
        other.step(torch.zeros(1, 1), other.timesteps[0], torch.zeros(1, 1))
    scheduler.set_timesteps(3)
    assert identity.position(torch.tensor(1)) == 0  # nothing was seen of the copies


def test_a_new_set_of_timesteps_is_another_calendar() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    identity = SchedulerIdentity(scheduler)
    before = identity.calendar
    assert identity.calendar is before
    scheduler.set_timesteps(5)
    assert identity.calendar is not before


def test_a_scheduler_that_was_never_set_says_nothing_about_the_number_of_steps() -> None:
    assert SchedulerIdentity(DDIMScheduler()).num_steps is None
