"""The harness of the zoo: one model class, reused, against the same model run eagerly with its attentions replayed."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.graph.flops import Work, speedup_bound
from dqar_fx.graph.sites import Site
from dqar_fx.runtime.runtime import Runtime

NUM_STEPS = 4
#: What a parameter that is zero, or was never initialised, is filled with: adaLN-Zero would hide the attention.
FILL_STD = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """A small configuration of one model class, and what must be found in it.

    Attributes:
        make: builds the model.
        inputs: keyword arguments of one call.
        timestep: name of the argument that holds the timestep, a tensor; it falls from step to step.
        varies: the tensors (or lists of tensors) that change from step to step.
        sites: how many attentions must be rewritten.
        breaks: graph breaks that Dynamo has on the model; 0: one graph.
        captures: graphs that Dynamo captures, if not one more than it breaks.
        left: calls of ``scaled_dot_product_attention`` that belong to no site: left computing, or run outside of every
            captured graph, or of a value that nobody uses.
        note: why the model is special.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    timestep: str
    varies: tuple[str, ...] = ("hidden_states",)
    sites: int = 0
    breaks: int = 0
    captures: int | None = None
    left: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """What was found in a model that passed.

    Attributes:
        model: name of its class.
        attentions: calls of ``scaled_dot_product_attention`` in one evaluation.
        sites: attentions that are rewritten.
        exits: for each site, the number of tensors that leave it.
        captures: graphs that Dynamo captured.
        breaks: graph breaks between them.
        pieces: parts that these were cut into.
        left: attention calls that belong to no site.
        refused: attentions that were found, but are left computing.
        flop_share: of the model, at this size, that vanishes if every site reuses.
        bound: how much faster a call that reuses every site can be at most, at this size.
    """

    model: str
    attentions: int
    sites: int
    exits: tuple[int, ...]
    captures: int
    breaks: int
    pieces: int
    left: int
    refused: int
    flop_share: float
    bound: float


def check(case: Case) -> Row:
    """Run the model in five ways and compare them bit for bit; raises ``AssertionError`` with what differs."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # diffusers and torch warn of what they will change some day; what dqar_fx warns of is an error.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*every attention comput")
        try:
            return _check(case)
        finally:
            torch._dynamo.reset()


def _check(case: Case) -> Row:
    model = build(case)
    with _as_traced():
        eager = _run(model, case)
    assert all(out.isfinite().all() for out in eager), "the eager model gives no finite numbers"

    reusing, runtime = _optimized(model, Schedule.none(NUM_STEPS))
    _same(_run(reusing, case, runtime), eager, "nothing reused, against eager")

    odd = Schedule.custom(NUM_STEPS, lambda step, *_: step % 2 == 1)
    if case.breaks:  # what is captured where Dynamo broke may depend on values, and is counted from here on
        reusing, runtime = _optimized(model, odd)
    else:
        runtime.follow(odd)  # captured once: Dynamo takes seconds
    reused = _run(reusing, case, runtime)
    replay = Replay(copy.deepcopy(model), runtime.sites)
    with _as_traced():
        expected = _run(replay.model, case, replay)
    _same(reused, expected, "reused at odd steps, against the replay")
    assert any(not torch.equal(a, b) for a, b in zip(reused, eager, strict=True)), "reuse changes nothing"

    row = _row(runtime, replay)
    counts = {"sites": row.sites, "breaks": row.breaks, "captures": row.captures, "left": row.left}
    captures = case.breaks + 1 if case.captures is None else case.captures
    stated = {"sites": case.sites, "breaks": case.breaks, "captures": captures, "left": case.left}
    assert counts == stated, f"found {counts}, stated {stated}\n{runtime.report()}"
    stats = runtime.stats
    assert (stats.reused, stats.computed) == (case.sites * NUM_STEPS // 2,) * 2, runtime.report()

    # The same once more, told by nothing but the timestep which step it is.
    _same(_run(reusing, case), expected, "reused at odd steps by the timestep alone")
    assert runtime.stats.reused == case.sites * NUM_STEPS // 2
    assert len(runtime.report().pieces) == row.captures, "captured again for the same shapes"
    return row


def _optimized(model: nn.Module, schedule: Schedule) -> tuple[nn.Module, Runtime]:
    """A copy of the model under the pass, and its runtime."""
    exact = CacheConfig(dtype="native", lossless=False)  # or it would reuse more than the replay
    optimized = dqar_fx.optimize(copy.deepcopy(model), schedule, cache=exact, backend="eager")
    return optimized, dqar_fx.runtime(optimized)


def build(case: Case) -> nn.Module:
    """The model in eval mode, with no parameter that is zero or uninitialised."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives with NaN, so that it is found below
    try:
        model = case.make().eval().requires_grad_(False)
    finally:
        torch.use_deterministic_algorithms(before)
    for parameter in model.parameters():
        if parameter.isnan().any() or not parameter.any():
            nn.init.normal_(parameter, std=FILL_STD)
    return model


@contextmanager
def _as_traced() -> Iterator[None]:
    """``torch.nn.MultiheadAttention`` as Dynamo sees it: without its fast path, which rounds differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(model: nn.Module, case: Case, steps: Runtime | Replay | None = None) -> list[Tensor]:
    """One generation: all tensors that the model returns, step by step. ``steps`` is told which step it is."""
    inputs = case.inputs(torch.Generator().manual_seed(1))
    outputs = []
    context = steps.generation(NUM_STEPS) if steps is not None else torch.no_grad()
    with torch.no_grad(), context:
        for step in range(NUM_STEPS):
            if steps is not None:
                steps.begin_step(step)
            changed = {name: _scaled(inputs[name], 1 + 0.05 * step) for name in case.varies}
            changed[case.timestep] = _later(inputs[case.timestep], step)
            found = list(_tensors(model(**{**inputs, **changed})))
            assert found, "the model returns no tensor"
            outputs += [out.clone() for out in found]
    return outputs


def _later(timestep: Tensor, step: int) -> Tensor:
    left = timestep * (NUM_STEPS - step)
    return left / NUM_STEPS if timestep.is_floating_point() else left // NUM_STEPS


def _scaled(value: Any, factor: float) -> Any:
    return value * factor if isinstance(value, Tensor) else type(value)(_scaled(v, factor) for v in value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(found) == len(expected), f"{what}: {len(found)} tensors in place of {len(expected)}"
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        step = index * NUM_STEPS // len(found)
        assert mine.shape == theirs.shape, f"{what}: step {step}: {tuple(mine.shape)} for {tuple(theirs.shape)}"
        error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        assert torch.equal(mine, theirs), f"{what}: step {step} differs by {error:.1e}"


def _row(runtime: Runtime, replay: Replay) -> Row:
    graphs = runtime.graphs
    work = Work([g.captured for g in graphs], [g.regions for g in graphs])
    saved = work.saved_together()
    stats = runtime.stats
    return Row(
        model=type(replay.model).__name__,
        attentions=replay.attentions,
        sites=len(runtime.sites),
        exits=tuple(len(site.exits) for site in runtime.sites),
        captures=stats.captures,
        breaks=stats.graph_breaks,
        pieces=sum(runtime.report().pieces),
        left=replay.attentions - replay.covered,
        refused=len(runtime.report().skipped),
        flop_share=saved / work.total,
        bound=speedup_bound(work.total, [saved]),
    )


#: One call of one module in one evaluation of the model: its path, and how often it was called before.
Call = tuple[str, int]


class Replay:
    """The oracle: an eager model whose sites give at odd steps a copy of what they gave at the step before.

    A site that a module owns is replayed as that module's return value. One without an owner is replayed as what
    ``scaled_dot_product_attention`` (or ``flex_attention``) itself returns: from there to the exit only parameters are
    mixed in.
    Which call belongs to which site is found in the first evaluation: they run in the order of the sites. After a graph
    break Dynamo knows the end of a path only, so the end of it is what is compared.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self.model = model
        self.attentions = 0
        self.covered = 0
        self._sites = list(sites)
        self._modules: set[Call] = set()
        self._products: set[tuple[Call, int]] = set()
        self._stored: dict[Any, Any] = {}
        self._step = 0
        self._stack: list[Call] = [("", 0)]
        self._counts: dict[Any, int] = {}
        for path, module in model.named_modules():
            if path:
                module.forward = self._wrapped(path, module.forward)

    @contextmanager
    def generation(self, num_steps: int) -> Iterator[None]:
        """While the model runs: every attention is watched."""
        products = [(F, "scaled_dot_product_attention"), (flex_attention, "flex_attention")]
        with ExitStack() as watched:
            for module, name in products:
                product = functools.partial(self._product, getattr(module, name))
                watched.enter_context(mock.patch.object(module, name, product))
            yield
        assert num_steps == NUM_STEPS
        missing = [f"{site.path} ({site.owner})" for site in self._sites]
        assert not missing, f"these sites are found nowhere in the eager model: {missing}"

    def begin_step(self, step: int) -> None:
        """The next evaluation is step ``step``."""
        self._step = step
        self._counts = {}

    def _count(self, key: Any) -> int:
        number = self._counts.get(key, 0)
        self._counts[key] = number + 1
        return number

    def _wrapped(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call = (path, self._count(path))
            if self._step % 2 and call in self._modules:
                return _copied(self._stored[call])
            if self._step == 0 and not self._inside() and self._next(owned=True) and self._owns(path):
                self._modules.add(call)
                del self._sites[0]
            self._stack.append(call)
            try:
                result = forward(*args, **kwargs)
            finally:
                self._stack.pop()
            if call in self._modules:
                self._stored[call] = _copied(result)
            return result

        return wrapper

    def _product(self, attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        innermost = self._stack[-1]
        key = (innermost, self._count(innermost))
        if self._step % 2 and key in self._products:
            return self._stored[key].clone()
        if self._step == 0:
            self.attentions += 1
            if self._inside():
                self.covered += 1
            elif self._next(owned=False) and _ends_with(innermost[0], self._sites[0].path):
                self.covered += 1
                self._products.add(key)
                del self._sites[0]
        result = attention(*args, **kwargs)
        if key in self._products:
            self._stored[key] = result.clone()
        return result

    def _inside(self) -> bool:
        return any(call in self._modules for call in self._stack)

    def _next(self, *, owned: bool) -> bool:
        return bool(self._sites) and bool(self._sites[0].owner) is owned

    def _owns(self, path: str) -> bool:
        site, module = self._sites[0], self.model.get_submodule(path)
        if type(module).__name__ != site.owner:
            return False
        if _ends_with(path, site.path):
            return True
        try:
            return self.model.get_submodule(site.path) is module  # shared by two parents: it has two paths
        except AttributeError:
            return False


def _ends_with(path: str, end: str) -> bool:
    return path == end or not end or path.endswith(f".{end}")


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_copied(v) for v in value)
    return value
