"""Running pipelines, and the oracle: the same pipeline run eagerly, its attentions replayed where the plan reuses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Plan, Schedule
from dqar_fx.graph.sites import Site
from tests.counting import CountsReads
from tests.pipelines.builders import BUILDERS, STEPS, Request

#: Two steps compute, then two of three reuse: steps 2, 3 and 5 of six.
SCHEDULE = Schedule.interval(STEPS, every=3, warmup=2)
#: More steps than any test runs; the schedule begins the same for every number of steps.
MANY = 50
#: As many steps as the warm-up of the schedule has: nothing is reused.
ALL_WARMUP = 2
#: What pipelines warn of: Mochi asks for an autocast that a CPU has not, Helios's scheduler hands tensors to numpy.
DIFFUSERS_WARNS = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
# Without what is exact at every step: the oracle replays by the plan alone.
SETTINGS: dict[str, Any] = {"cache": CacheConfig(dtype="native", lossless=False), "backend": "eager"}


def generate(pipe: Any, kwargs: Mapping[str, Any], seed: int = 0) -> Tensor:
    """One sample of a pipeline, as a tensor."""
    torch.manual_seed(seed)  # DiTPipeline hands its generator to nothing but the first noise
    result = pipe(**kwargs, generator=torch.Generator().manual_seed(seed), return_dict=False)[0]
    if isinstance(result, list):
        result = torch.stack([torch.as_tensor(r) for r in result])
    result = torch.as_tensor(result)
    assert result.isfinite().all()
    return result


def build(name: str, **request: Any) -> tuple[Any, dict[str, Any]]:
    """A fresh pipeline and the arguments of its call."""
    return BUILDERS[name](Request(**request))


def call_of(name: str, **request: Any) -> dict[str, Any]:
    """The arguments of a call."""
    return build(name, **request)[1]


@functools.cache
def eager(name: str) -> Any:
    """The eager pipeline, one for all tests."""
    return build(name)[0]


def fresh(name: str) -> Any:
    """A pipeline whose transformer is optimised, its scheduler known."""
    pipe = build(name)[0]
    dqar_fx.optimize(pipe.transformer, SCHEDULE, scheduler=pipe.scheduler, **SETTINGS)
    return pipe


#: The same, one for all tests: whatever a test does must not show in another.
optimized = functools.cache(fresh)


def expected(
    pipe: Any,
    name: str,
    kwargs: Mapping[str, Any],
    seed: int = 0,
    *,
    by_timestep: bool = False,
    first: int = 0,
    sites: Sequence[Site] | None = None,
) -> Tensor:
    """What a call of the optimised ``pipe``, which has run before, must give: by the oracle, on the eager pipeline.

    Args:
        by_timestep: no scheduler was given, so that only another timestep is another step.
        first: the step that the first timestep then counts as.
        sites: those of a step's first evaluation, should others leave some out.
    """
    reference = eager(name)
    with on_scheduler(reference, pipe.scheduler):
        if not by_timestep:
            first = first_step(reference, kwargs)
        runtime = dqar_fx.runtime(pipe.transformer)
        sites = runtime.sites if sites is None else sites
        oracle = Oracle(reference, sites, runtime.schedule, first, by_timestep=by_timestep)
        with oracle.replaying():
            return generate(reference, kwargs, seed)


def first_step(pipe: Any, kwargs: Mapping[str, Any]) -> int:
    """The step at which a generation starts: in the middle of the schedule if it changes an image."""
    if "strength" not in kwargs:
        return 0
    scheduler = pipe.scheduler
    with mock.patch.object(scheduler, "step", wraps=scheduler.step) as step:
        generate(pipe, kwargs)
    return len(scheduler.timesteps) - step.call_count


def plain(pipe: Any, name: str, kwargs: Mapping[str, Any], seed: int = 0) -> Tensor:
    """The same without any reuse."""
    reference = eager(name)
    with on_scheduler(reference, pipe.scheduler):
        return generate(reference, kwargs, seed)


@contextmanager
def on_scheduler(pipe: Any, scheduler: Any) -> Iterator[None]:
    """``pipe`` with a new scheduler of the same kind and settings as ``scheduler``."""
    before = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    try:
        yield
    finally:
        pipe.scheduler = before


def reuse_by_step(pipe: Any, part: str = "transformer") -> dict[tuple[int, str], list[bool]]:
    """Which sites reused in the last generation, for each step and branch; no two calls may share one."""
    rows: dict[tuple[int, str], list[bool]] = {}
    runtime = dqar_fx.runtime(getattr(pipe, part))
    for decision in runtime.stats.decisions:
        rows.setdefault((decision.step, decision.branch), []).append(decision.action == "reuse")
    sites = len(runtime.sites)
    assert {len(row) for row in rows.values()} <= {sites}, "a step was evaluated twice in one branch"
    return rows


def planned(
    pipe: Any, branches: Sequence[str], *, first: int = 0, part: str = "transformer"
) -> dict[tuple[int, str], list[bool]]:
    """The same as planned for the scheduler's number of steps."""
    steps, sites = len(pipe.scheduler.timesteps), len(dqar_fx.runtime(getattr(pipe, part)).sites)
    plan = plan_for(SCHEDULE, sites, steps)
    return {(t, branch): plan.reuse[t].tolist() for t in range(first, steps) for branch in branches}


@functools.cache
def plan_for(schedule: Schedule, sites: int, steps: int) -> Plan:
    """The plan of a schedule, made once."""
    return schedule.plan(sites, steps)


def reads(pipe: Any, call: Mapping[str, Any]) -> int:
    """How often a call of the pipeline asks for a value."""
    tolist = Tensor.tolist
    lists = []

    def counted(self: Tensor) -> Any:  # on a CPU this is no operation that could be seen
        lists.append(1)
        return tolist(self)

    with mock.patch.object(Tensor, "tolist", counted), CountsReads() as mode:
        generate(pipe, call)
    return mode.reads + len(lists)


class Oracle:
    """An eager pipeline whose attentions give what they gave before wherever the plan reuses.

    A step ends where the scheduler steps (before the next evaluation; how often does not matter), or where the timestep
    changes; new timesteps (a video made in sections) begin a run of their own. A branch is what the pipeline calls it
    (``cache_context``). A second call at one step and branch makes the branch forget; so do other shapes. A site that a
    module owns is replayed as what the module returns, another one as what ``scaled_dot_product_attention`` returns.

    Args:
        first: the step of the first evaluation.
        by_timestep: no scheduler was given, so that only another timestep is another step.
        part: the name of the transformer in the pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        sites: Sequence[Site],
        schedule: Schedule,
        first: int = 0,
        *,
        by_timestep: bool = False,
        part: str = "transformer",
    ) -> None:
        self.evaluations = 0
        self._pipe = pipe
        self._model = getattr(pipe, part)
        self._schedule = schedule
        self._all_sites = list(sites)
        self._sites = list(sites)  # those not found in the model yet
        self._first = self._step = first
        self._stepped = False
        self._by_timestep = by_timestep
        self._timestep: object = None
        self._branch = ""
        self._called: set[tuple[int, str]] = set()
        self._shapes: dict[str, object] = {}
        self._stored: dict[tuple[str, int], tuple[int, Any]] = {}  # (branch, site) -> step, value
        self._site_of: dict[Any, int] = {}
        self._computes = True
        self._stack: list[Any] = []
        self._counts: dict[Any, int] = {}
        self._attention = F.scaled_dot_product_attention

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While the pipeline runs."""
        model, scheduler = self._model, self._pipe.scheduler
        handle = model.register_forward_pre_hook(self._begin_call, with_kwargs=True)
        wrapped = [(path, module) for path, module in model.named_modules() if path]
        for path, module in wrapped:
            module.forward = self._replayed(path, type(module).__name__, module.forward)
        named = hasattr(model, "cache_context")
        if named:
            model.cache_context = self._named(model.cache_context)
        watched = {} if self._by_timestep else {"step": self._end_step, "set_timesteps": self._begin_run}
        try:
            with ExitStack() as stack:
                stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", self._product))
                for method, heard in watched.items():
                    stack.enter_context(heard_calls(scheduler, method, heard))
                yield
        finally:
            handle.remove()
            for _, module in wrapped:
                del module.forward
            if named:
                del model.cache_context
        assert not self._sites, f"found nowhere in the eager model: {[s.path for s in self._sites]}"

    def _end_step(self) -> None:
        self._stepped = self.evaluations > 0

    def _begin_run(self) -> None:
        self._step, self._stepped = self._first, False
        self._called, self._shapes, self._stored = set(), {}, {}

    def _named(self, context: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def named(name: str, **kwargs: Any) -> Iterator[None]:
            self._branch = name
            try:
                with context(name, **kwargs):
                    yield
            finally:
                self._branch = ""

        return named

    def _begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.evaluations += 1
        if self._by_timestep:
            timestep = kwargs["timestep"].tolist()
            self._stepped, self._timestep = self._timestep not in (None, timestep), timestep
        self._step, self._stepped = self._step + self._stepped, False
        self._counts = {}
        shapes = _shapes((args, kwargs))
        repeats = (self._step, self._branch) in self._called
        if repeats or self._shapes.get(self._branch) != shapes:
            self._stored = {key: value for key, value in self._stored.items() if key[0] != self._branch}
        self._called.add((self._step, self._branch))
        self._shapes[self._branch] = shapes
        self._computes = repeats

    def _read(self, site: int | None) -> Any:
        """The stored value, if the plan reads it now and it is no older than planned."""
        if site is None or self._computes:
            return None
        steps = MANY if self._by_timestep else len(self._pipe.scheduler.timesteps)
        plan = plan_for(self._schedule, len(self._all_sites), steps)
        if not plan.reuse[self._step, site] or (self._branch, site) not in self._stored:
            return None
        step, value = self._stored[self._branch, site]
        return _copied(value) if self._step - step <= plan.age[self._step, site] else None

    def _store(self, site: int | None, value: Any) -> None:
        if site is not None and not self._computes:
            self._stored[self._branch, site] = self._step, _copied(value)

    def _count(self, key: Any) -> int:
        self._counts[key] = self._counts.get(key, -1) + 1
        return self._counts[key]

    def _replayed(self, path: str, owner: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def replayed(*args: Any, **kwargs: Any) -> Any:
            key = (path, self._count(path))
            if self.evaluations == 1:
                self._find_site(key, path, owner)
            value = self._read(self._site_of.get(key))
            if value is not None:
                return value
            self._stack.append(key)
            try:
                value = forward(*args, **kwargs)
            finally:
                self._stack.pop()
            self._store(self._site_of.get(key), value)
            return value

        return replayed

    def _product(self, *args: Any, **kwargs: Any) -> Tensor:
        inside = self._stack[-1] if self._stack else ("", 0)
        key = (inside, self._count(inside))
        if self.evaluations == 1:
            self._find_site(key, inside[0], "")
        value = self._read(self._site_of.get(key))
        if value is None:
            value = self._attention(*args, **kwargs)
            self._store(self._site_of.get(key), value)
        return value

    def _find_site(self, key: Any, inside: str, owner: str) -> None:
        """In the first evaluation: the first site left that fits. After a graph break only ends of paths are known."""
        if any(call in self._site_of for call in self._stack):
            return
        for site in self._sites:
            if site.owner == owner and (not site.path or f".{inside}".endswith(f".{site.path}")):
                self._site_of[key] = self._all_sites.index(site)
                self._sites.remove(site)
                return


@contextmanager
def heard_calls(scheduler: Any, method: str, heard: Callable[[], None]) -> Iterator[None]:
    """Hear when a method of a scheduler is called; of copies, which some pipelines make and step as well, nothing."""
    before = getattr(type(scheduler), method)

    @functools.wraps(before)  # pipelines look at the signature
    def call(this: Any, *args: Any, **kwargs: Any) -> Any:
        if this is scheduler:
            heard()
        return before(this, *args, **kwargs)

    with mock.patch.object(type(scheduler), method, call):
        yield


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((key, _shapes(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(item) for item in value)
    return None


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(item) for item in value)
    return value
