"""Whole steps as CUDA graphs: recorded where a step's decisions repeat, and launched at once from then on.

A step with given outcomes is a fixed list of kernels, so the host's work for it can be done once. A recording repeats
its kernels at the addresses that they had, which is right as long as these are what they were:

* what a call is given (latents, timestep, prompt) is copied into static memory before; prompts and the like only where
  they are other tensors, or were written into;
* parameters, stored values and what is computed once a generation are used where they are: their addresses are part of
  what tells one recording from another, and are read at every call. Weights that change in place are those that the
  kernels read; other memory, be it new weights, another generation's store or what an eviction has freed, is another
  recording;
* intermediate values live in a pool that all recordings of a model share, and nobody else. That is sound because no
  value in it is needed once its recording has run: what a step returns is copied out behind it, on the same stream,
  under one lock; a call from another stream first waits for the one before.

A step is recorded when it comes for the third time, with the same shapes and addresses: the first one compiles, the
second runs over the static memory (so that whatever is made lazily is made before the recording).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dqar_fx.errors import RuntimeStateError
from dqar_fx.graph.capture import is_parameter
from dqar_fx.graph.effects import storages, written
from dqar_fx.graph.recordable import why_not_recordable
from dqar_fx.graph.specialise import MEASURING
from dqar_fx.runtime.cache import Kept, Store
from dqar_fx.runtime.lossless import constant_inputs
from dqar_fx.runtime.program import CapturedGraph, Outcomes, Program

#: Recordings that one model keeps. Steps of a schedule without a period (DQAR's linear one) are all different: this is
#: room for the 50 of a usual run. Each takes some kilobytes a kernel on the device besides what they share.
MAX_GRAPHS = 64
#: Steps that are remembered to have run, recorded or not.
_MAX_SEEN = 1024

#: Captures in one process must not overlap (``torch.cuda.graph`` says so).
_capturing = threading.Lock()


class Recorder(Protocol):
    """What records and repeats; one for each device of a model."""

    def is_busy(self) -> bool:
        """True while somebody else records the present stream: nothing may be recorded or repeated inside of that."""

    def wait(self, static: Iterable[torch.Tensor]) -> None:
        """Order what is launched from here on behind the last use of static memory, on whatever stream that was.

        ``static``: the memory that is going to be used, beside that of a recording.
        """

    def record(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        """Record what ``run`` launches, without running it: what launches it, and what ``run`` returned, whose memory
        each launch writes anew. An exception leaves nothing behind."""

    def trim(self) -> None:
        """Give memory that nobody uses any more back to the device."""


class CudaRecorder:
    """``torch.cuda.graph`` with a stream and a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._last: torch.cuda.Stream | None = None
        self._streams = 0  # how often another stream was the present one

    def is_busy(self) -> bool:
        """See ``Recorder``."""
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def wait(self, static: Iterable[torch.Tensor]) -> None:
        """See ``Recorder``."""
        present = torch.cuda.current_stream(self._device)
        if self._last is None or self._last != present:
            if self._last is not None:
                present.wait_stream(self._last)
            self._last = present
            self._streams += 1
        if self._streams > 1:
            for tensor in static:  # so that it is not freed, and taken by others, before this stream is done with it
                tensor.record_stream(present)

    def record(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        """See ``Recorder``."""
        recorded = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(self._device):
            # A thread's first handle allocates, which a capture does not allow.
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            # The outer stream context is for a capture that fails: `torch.cuda.graph` then does not switch back.
            with _own_workspaces(), torch.cuda.stream(self._stream):
                try:
                    with torch.cuda.graph(
                        recorded, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                    ):
                        results = run()
                except BaseException:
                    # Before torch 2.13 a capture that fails to end leaves the allocator in it (pytorch#180395).
                    with contextlib.suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                    raise
        return recorded.replay, results

    def trim(self) -> None:
        """See ``Recorder``."""
        torch.cuda.empty_cache()


def step_graphs(setting: object, compiler: object) -> StepGraphs | None:
    """What ``cuda_graphs=setting`` asks for; None where there is no CUDA device to record on.

    Args:
        setting: ``"auto"``, True or False.
        compiler: what compiles the pieces. Where it makes CUDA graphs of its own, two would record each other.

    Raises:
        RuntimeStateError: another setting, True without a CUDA device, or True beside the compiler's own.
    """
    if setting is not True and setting is not False and setting != "auto":
        raise RuntimeStateError(f'cuda_graphs is {setting!r}. Use "auto" (on where there is CUDA), True or False.')
    if not setting:
        return None
    if not torch.cuda.is_available():
        if setting is True:
            raise RuntimeStateError(
                'cuda_graphs=True, but torch finds no CUDA device. Use cuda_graphs="auto", which is off without one.'
            )
        return None
    graphs = StepGraphs(required=setting is True)
    if _makes_cuda_graphs(compiler):
        if setting is True:
            raise RuntimeStateError(
                "cuda_graphs=True, but the pieces are compiled into CUDA graphs of their own (mode='reduce-overhead' "
                "or 'max-autotune', triton.cudagraphs, backend='cudagraphs'), which cannot be recorded once more. Use "
                "mode='max-autotune-no-cudagraphs' or None, or leave cuda_graphs out."
            )
        graphs.refuse(None, "the pieces are compiled into CUDA graphs of their own (mode, or options)", warn=False)
    return graphs


def _makes_cuda_graphs(compiler: object) -> bool:
    if getattr(compiler, "compiler_name", "") == "cudagraphs":
        return True
    config = getattr(compiler, "config", None)
    if not isinstance(config, dict):
        return False
    from torch._inductor import config as inductor

    return bool(config.get("triton.cudagraphs", inductor.triton.cudagraphs))


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """A recording keeps the address of cuBLAS's workspace. Cleared before, it is allocated from the pool; cleared
    behind, nobody else is given it (pytorch#193402). Inductor's CUDA graphs do the same."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@dataclass(frozen=True, slots=True)
class GraphCounts:
    """What became of a model's CUDA graphs.

    Attributes:
        held: recordings that can be launched now.
        recorded: how often a step was recorded.
        replayed: how often a recording was launched; every other step ran kernel by kernel.
        evicted: recordings that made room for others.
        reasons: why captured graphs, or the whole model, are not recorded; empty where all are.
    """

    held: int = 0
    recorded: int = 0
    replayed: int = 0
    evicted: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Seen:
    """A step (outcomes, shapes, addresses) that has run."""

    program: Program  # holds it, so that its identity in the key stays its own
    runner: GraphRunner
    store: Store | None
    runs: int = 0
    last: int = 0  # when it last ran
    before: int = 0  # ... and the time before that
    inputs: StaticInputs | None = None
    replay: Callable[[], None] | None = None
    results: Sequence[Any] = ()


_Key = tuple[int, tuple[int, ...], tuple[int, ...]]


class StepGraphs:
    """The CUDA graphs of one model.

    Args:
        make: makes the recorder of a device.
        device: the kind of device that is recorded on.
        limit: how many recordings are kept. One makes room for another where that has run twice since it last ran
            itself (LRU-2: O'Neil et al., 1993): of more steps in turn than there is room for, some stay recorded.
        required: refuse a model on another kind of device, and warn about graphs that cannot be recorded.
    """

    def __init__(
        self,
        make: Callable[[torch.device], Recorder] = CudaRecorder,
        *,
        device: str = "cuda",
        limit: int = MAX_GRAPHS,
        required: bool = False,
    ) -> None:
        self.lock = threading.RLock()
        self._make, self._device, self._limit, self._required = make, device, limit, required
        self._recorders: dict[torch.device, Recorder] = {}
        self._seen: OrderedDict[_Key, _Seen] = OrderedDict()
        self._held: OrderedDict[_Key, _Seen] = OrderedDict()  # of these, those recorded, least recently used first
        self._reasons: dict[GraphRunner | None, str] = {}
        self._runners: list[GraphRunner] = []
        self._time = self._recorded = self._replayed = self._evicted = 0

    # -- what the runtime asks ----------------------------------------------------------------------------------------

    def take(self, graph: CapturedGraph, latents: str, *, on_host: bool) -> GraphRunner | None:
        """What runs ``graph`` from now on; None where nothing of it can be recorded.

        Args:
            graph: just captured.
            latents: name of the forward's argument that holds the latents, "" where that is not known.
            on_host: stored values live in host memory, and are copied while the graph runs.

        Raises:
            RuntimeStateError: CUDA graphs are required, and the model is elsewhere.
        """
        devices = {t.device for t in _examples(graph)}
        if self._required and self._device not in {d.type for d in devices}:
            raise RuntimeStateError(
                f"cuda_graphs=True, but the model runs on {', '.join(sorted(map(str, devices))) or 'no device'}. Move "
                f'it to a CUDA device, or use cuda_graphs="auto", which is off elsewhere.'
            )
        reason = why_not_recordable(graph.captured, self._device)
        if not reason and on_host:
            reason = "stored values are copied from and to host memory (CacheConfig.device)"
        runner = GraphRunner(self, graph, constant_inputs(graph.sources, latents))
        if reason:
            self.refuse(runner, reason, warn=self._required)
        if self.is_refused(runner):
            return None
        self._runners.append(runner)
        return runner

    @property
    def is_on(self) -> bool:
        """True if anything of the model may be recorded, so that stored values should keep their addresses."""
        return not all(map(self.is_refused, self._runners))

    def uses(self, store: Store) -> bool:
        """True if a recording reads or writes ``store``."""
        return any(step.store is store for step in self._held.values())

    @property
    def counts(self) -> GraphCounts:
        """What became of them so far."""
        reasons = tuple(dict.fromkeys(self._reasons.values()))
        return GraphCounts(len(self._held), self._recorded, self._replayed, self._evicted, reasons)

    def forget(self) -> None:
        """Let go of every recording, and of what is known of steps that ran."""
        with self.lock:
            self._held.clear()
            self._seen.clear()

    # -- what its runners ask, under its lock -------------------------------------------------------------------------

    def recorder(self, device: torch.device) -> Recorder:
        """The recorder for ``device``."""
        if device not in self._recorders:
            self._recorders[device] = self._make(device)
        return self._recorders[device]

    def is_refused(self, runner: GraphRunner) -> bool:
        """True if this one's graph, or the whole model, is not recorded (any more)."""
        return runner in self._reasons or None in self._reasons

    def note(self, key: _Key, program: Program, runner: GraphRunner, store: Store | None) -> _Seen:
        """The step ``key`` runs now."""
        self._time += 1
        step = self._seen.get(key)
        if step is None:
            step = self._seen[key] = _Seen(program, runner, store)
            if len(self._seen) > _MAX_SEEN:
                oldest = next((k for k in self._seen if k not in self._held), None)
                if oldest is not None:
                    del self._seen[oldest]
        step.runs, step.before, step.last = step.runs + 1, step.last, self._time
        return step

    def has_room(self, step: _Seen) -> bool:
        """True if ``step`` may be recorded; another may have been let go for it."""
        if len(self._held) >= self._limit:
            key, oldest = next(iter(self._held.items()))
            if oldest.last >= step.before:
                return False
            del self._held[key], self._seen[key]
            self._evicted += 1
        return True

    def hold(self, key: _Key, step: _Seen, recording: tuple[Callable[[], None], Sequence[Any]]) -> None:
        """``step`` has been recorded."""
        step.replay, step.results = recording
        self._held[key] = step
        self._recorded += 1

    def replays(self, key: _Key) -> None:
        """The recording of ``key`` is launched."""
        self._held.move_to_end(key)
        self._replayed += 1

    def refuse(self, runner: GraphRunner | None, reason: str, *, warn: bool) -> None:
        """From here on nothing of this one's graph (None: of the model) is recorded, and nothing of it is held."""
        with self.lock:
            self._reasons[runner] = reason
            for steps in (self._held, self._seen):
                for key in [key for key, step in steps.items() if runner in (None, step.runner)]:
                    del steps[key]
        if warn:
            warnings.warn(f"steps run without CUDA graphs: {reason}", stacklevel=8)

    def ran_out_of_memory(self) -> None:
        """Record nothing from here on, and give all that is held back to the device."""
        with self.lock:
            self.refuse(None, "the device ran out of memory", warn=False)
            for recorder in self._recorders.values():
                recorder.trim()
        warnings.warn("steps run without CUDA graphs from here on: the device ran out of memory", stacklevel=8)


class GraphRunner:
    """Runs one captured graph, through recordings where its steps repeat.

    Args:
        owner: holds the recordings of the model.
        graph: what it runs.
        constant: those of the graph's sources that stay the same during a generation.
    """

    def __init__(self, owner: StepGraphs, graph: CapturedGraph, constant: frozenset[str]) -> None:
        self._owner = owner
        self._graph = graph
        self._constant = constant
        self._layout: _Layout | None = None
        self._inputs: weakref.WeakValueDictionary[tuple[object, ...], StaticInputs] = weakref.WeakValueDictionary()

    def run(
        self,
        arguments: Sequence[Any],
        outcomes: Outcomes,
        store: Store | None,
        sizes: tuple[object, ...],
        kept: Kept | None = None,
    ) -> list[Any]:
        """As ``CapturedGraph.run``, which it leads to where nothing is recorded."""
        owner = self._owner
        results: list[Any] | None = None
        if owner.is_refused(self):
            return self._graph.run(arguments, outcomes, store, sizes, kept)
        if kept is not None and kept.values is None:
            results = self._graph.run(arguments, outcomes, store, sizes, kept)  # not into the recordings' memory
            _settle(store, kept)
            return results
        try:
            with owner.lock:
                results = self._run_static(arguments, outcomes, store, sizes, kept)
            if results is not None:
                return results
            return self._graph.run(arguments, outcomes, store, sizes, kept)
        except torch.OutOfMemoryError:
            if not owner.counts.held or not self._is_repeatable(outcomes):
                raise
        owner.ran_out_of_memory()  # what recordings hold is what it lacked
        return self._graph.run(arguments, outcomes, store, sizes, kept)

    def _is_repeatable(self, outcomes: Outcomes) -> bool:
        """True if a step that was broken off can be run again: it stores what it would have, and changes no state."""
        nodes = self._graph.captured.graph.nodes
        state = frozenset().union(*(storages(n) for n in nodes if n.op in ("placeholder", "get_attr")))
        writes = any(storages(target) & state for node in nodes for target in written(node))
        return not writes and MEASURING.isdisjoint(outcomes)

    def _run_static(
        self,
        arguments: Sequence[Any],
        outcomes: Outcomes,
        store: Store | None,
        sizes: tuple[object, ...],
        kept: Kept | None,
    ) -> list[Any] | None:
        """Run it over static memory; None where it is to be run as it is."""
        owner, graph, layout = self._owner, self._graph, self._layout
        if layout is None:
            layout = self._layout = _Layout(graph, arguments, self._constant)
            if layout.reason:
                owner.refuse(self, layout.reason, warn=False)
        if layout.reason:
            return None
        recorder = owner.recorder(layout.device)
        if recorder.is_busy():
            return None
        program, stored = graph.prepare(outcomes, store, sizes, kept.values if kept is not None else None)
        key = (id(program), _addresses(stored), _addresses([arguments[i] for i in layout.in_place]))
        step = owner.note(key, program, self, store)
        if step.runs == 1:
            return None
        inputs = step.inputs
        if inputs is None:
            inputs = self._inputs.get(sizes)
            if inputs is None:
                inputs = self._inputs[sizes] = StaticInputs(layout, arguments)
            step.inputs = inputs
        if not inputs.fits(arguments):
            return None
        if step.runs > 2 and step.replay is None and not owner.has_room(step):
            return None
        recorder.wait(inputs.tensors)
        static = inputs.fill(arguments)
        if step.runs == 2:
            return graph.run(static, outcomes, store, sizes, kept)
        if step.replay is None:
            try:
                recording = recorder.record(lambda: graph.run(static, outcomes, store, sizes, kept))
            except torch.OutOfMemoryError:
                out_of_memory = True
            except Exception as error:  # whatever it was: the step has not run, and will without it
                text = str(error).split("\n", 1)[0]
                reason = f"a step could not be recorded ({type(error).__name__}: {text})"
                owner.refuse(self, reason, warn=True)
                return None
            else:
                out_of_memory = False
                owner.hold(key, step, recording)
            if out_of_memory:  # here, where the exception no longer holds what was allocated
                owner.ran_out_of_memory()
                return None
        assert step.replay is not None
        owner.replays(key)
        step.replay()
        return [_copy(value) if isinstance(value, torch.Tensor) else value for value in step.results]


class _Layout:
    """Which of a graph's arguments are copied before it runs, and which are used where they are.

    Attributes:
        copied: positions of the arguments of a call.
        constant: of these, the ones that stay the same during a generation.
        in_place: positions of the model's own tensors.
        device: where all of them are.
        reason: why none of it can be recorded, "" if it can.
    """

    def __init__(self, graph: CapturedGraph, arguments: Sequence[Any], constant: frozenset[str]) -> None:
        self.copied: list[int] = []
        self.in_place: list[int] = []
        self.device, self.reason = torch.device("meta"), ""
        self.constant: frozenset[int] = frozenset()
        devices = {constant.device for constant in graph.constants}
        for i, node in enumerate(n for n in graph.captured.graph.nodes if n.op == "placeholder"):
            value = arguments[i]
            if not node.users or not isinstance(value, torch.Tensor):
                continue  # a number is a size, and these are part of what a program is for
            if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided:
                self.reason = f"{graph.sources[i]} is a {type(value).__name__}, whose memory is not known"
                return
            devices.add(value.device)
            in_place = is_parameter(node) or isinstance(value, nn.Parameter)
            (self.in_place if in_place else self.copied).append(i)
        if len(devices) != 1:
            self.reason = f"it is given tensors on {', '.join(sorted(map(str, devices))) or 'no device'}"
            return
        self.device = devices.pop()
        self.constant = frozenset(i for i in self.copied if graph.sources[i] in constant)


class StaticInputs:
    """What the calls of a graph are given, copied to addresses that stay.

    Args:
        layout: which arguments these are.
        arguments: of a call; of the same shapes and strides as those to come.
    """

    def __init__(self, layout: _Layout, arguments: Sequence[Any]) -> None:
        self._constant = layout.constant
        with torch.inference_mode(False), torch.no_grad():
            self._tensors = {i: _like(arguments[i]) for i in layout.copied}
        #: By position: the tensor that was last copied, its version and its address.
        self._last: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """The copies."""
        return self._tensors.values()

    def fits(self, arguments: Sequence[Any]) -> bool:
        """True if these are laid out as those that it was made for."""
        return all(
            arguments[i].shape == static.shape and arguments[i].stride() == static.stride()
            for i, static in self._tensors.items()
        )

    def fill(self, arguments: Sequence[Any]) -> list[Any]:
        """``arguments`` with the static tensors in place, holding the same values."""
        filled = list(arguments)
        with torch.no_grad():
            for i, static in self._tensors.items():
                given = arguments[i]
                filled[i] = static
                if i in self._constant and not given.is_inference():
                    # The object, not only its memory: what others write into memory behind torch's back (their own
                    # CUDA graphs) they hand out as a new one.
                    last, present = self._last.get(i), (given._version, given.data_ptr())
                    if last is not None and last[0]() is given and last[1:] == present:
                        continue
                    self._last[i] = (weakref.ref(given), *present)
                _flat(static).copy_(_flat(given))
        return filled


def _settle(store: Store | None, kept: Kept) -> None:
    """Move what was computed once to where it was in the generation before: recordings are of these addresses."""
    assert store is not None
    assert kept.values is not None
    pairs = list(zip(store.settled, kept.values, strict=False))
    if len(store.settled) != len(kept.values) or not all(_alike(old, new) for old, new in pairs):
        store.settled = kept.values
        return
    with torch.no_grad():
        for old, new in pairs:
            old.copy_(new)
    kept.values = store.settled


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    layouts = [(x.shape, x.stride(), x.dtype, x.device, x.is_inference()) for x in (a, b)]
    return layouts[0] == layouts[1]


def _addresses(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(map(torch.Tensor.data_ptr, tensors))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of ``tensor`` from its first to its last element, as one dimension: whatever its strides are (those of
    an expanded timestep are 0), a copy of it can have the same."""
    if tensor.is_contiguous():
        return tensor
    return tensor.as_strided((_span(tensor),), (1,))


def _span(tensor: torch.Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0


def _like(tensor: torch.Tensor) -> torch.Tensor:
    memory = torch.empty(_span(tensor), dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride())


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the same strides, in memory of its own."""
    if tensor.is_contiguous():
        return tensor.clone()
    return _flat(tensor).clone().as_strided(tensor.shape, tensor.stride(), 0)


def _examples(graph: CapturedGraph) -> Iterator[torch.Tensor]:
    for node in graph.captured.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            yield value
