"""What is stored: static buffers, and for each site the step its value comes from."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from dqar_fx.graph.specialise import DIFFERENCE, LENT, MEASUREMENTS, ExitLayout
from dqar_fx.quantize import scale_shape
from dqar_fx.runtime.history import History

#: Step of a site that holds no value.
EMPTY = -1


def is_apart(device: torch.device) -> bool:
    """True if ``device`` has a memory other than the host's."""
    return device.type != "cpu"


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """Shape, strides, device and layout of one exit, sizes resolved: all that is needed to allocate its buffers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    layout: ExitLayout
    on_host: bool = False
    factors: torch.Tensor | None = field(default=None, compare=False)  # calibrated
    lossless: bool = False  # read at steps that no plan knows of

    @property
    def is_special(self) -> bool:
        """True if its memory serves no other exit that looks the same."""
        return self.lossless or self.layout.late_size or self.factors is not None

    def allocate(self) -> tuple[torch.Tensor, ...]:
        """New buffers: ``(values,)``, ``(int8 values [shape], float32 scales)``, or the same in bytes of two values.

        Where the exit is balanced, its factors follow: room for them, or the calibrated ones.

        On the device of the exit, or in host memory (``on_host``), pinned where the exit is on CUDA. The strides of the
        exit are kept, so that a value read back is laid out like a fresh one. Never inference tensors: one and the same
        buffer may be written inside and outside of ``torch.inference_mode``.
        """
        with torch.inference_mode(False), torch.no_grad():
            layout, size = self.layout, self.layout.size
            dtype = torch.uint8 if size else torch.int8 if layout.granularity else layout.dtype
            shape, stride = _packed(self.shape, self.stride) if size else (self.shape, self.stride)
            device = torch.device("cpu") if self.on_host else self.device
            pinned = self.on_host and self.device.type == "cuda"
            values = torch.empty_strided(shape, stride, dtype=dtype, device=device, pin_memory=pinned)
            if not layout.granularity:
                return (values,)
            shape = scale_shape(self.shape, layout.granularity, layout.num_heads)
            if size:
                shape = (*shape[:-1], -(-size // layout.group))
            scales = torch.empty(shape, dtype=torch.float32, device=device, pin_memory=pinned)
            if not layout.balance:
                return values, scales
            shape = scale_shape(self.shape, "channel") if self.factors is None else self.factors.shape
            factors = torch.empty(shape, dtype=torch.float32, device=device, pin_memory=pinned)
            return values, scales, factors if self.factors is None else factors.copy_(self.factors)


def _packed(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a tensor like this whose last dimension, innermost in memory, is packed in pairs."""
    packed = (*shape[:-1], -(-shape[-1] // 2))
    strides, step = [1] * len(shape), packed[-1]
    for i in sorted(range(len(shape) - 1), key=lambda i: (stride[i], shape[i])):
        strides[i], step = step, step * packed[i]
    return packed, tuple(strides)


_Buffers = list[tuple[torch.Tensor, ...]]  # of one site, [exit][part]


def _bytes(buffers: _Buffers) -> int:
    return sum(t.numel() * t.element_size() for parts in buffers for t in parts)


class Loan(NamedTuple):
    """A site whose value is another store's: whose, in which of its epochs, and the buffers that stand by meanwhile."""

    lender: Store
    epoch: int
    own: _Buffers | None


@dataclass(slots=True, eq=False)
class Rows:
    """What depends on the timestep but on no latent, by step (see ``runtime.timestep_values``), and what it is of.

    The scheduler's ``calendar``, ``inputs`` and ``weights`` are held, so that their memory cannot be taken by others.
    """

    calendar: torch.Tensor
    key: tuple[object, ...]
    first: int  # the step that ``values`` begins with
    inputs: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    versions: tuple[list[int], list[int]]
    values: Sequence[tuple[torch.Tensor, ...]]

    @property
    def bytes(self) -> int:
        """Bytes of the values of all steps."""
        return sum(value.numel() * value.element_size() for row in self.values for value in row)


@dataclass(slots=True)
class Kept:
    """What stays the same during a generation (see ``graph.hoist``), and what it was computed from.

    The values are computed right if ``inputs`` and ``weights`` are: these are held here, so that their memory cannot be
    taken by others, together with how often each had been written into.
    """

    inputs: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    versions: tuple[list[int], list[int]]
    inference: bool  # computed in inference mode
    values: list[torch.Tensor] | None = None  # None until they are computed
    row: Sequence[torch.Tensor] = ()  # of the present call: what depends on its timestep

    @property
    def bytes(self) -> int:
        """Bytes of the values; views of one memory count once."""
        storages = [value.untyped_storage() for value in self.values or ()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(slots=True)
class Store:
    """The stored values of one captured graph, at given sizes, for one branch of one generation.

    Buffers are allocated at the first store and keep their addresses from then on; ``clear`` forgets the values and
    keeps the buffers, dropping the object frees them.
    """

    specs: Sequence[Sequence[ExitSpec]]  # [site][exit]
    buffers: list[_Buffers | None] = field(init=False)
    step: list[int] = field(init=False)  # [site]: the step whose value is stored, EMPTY if none
    kept: Kept | None = field(default=None, init=False)  # what was computed once, for good
    rows: Rows | None = field(default=None, init=False)  # what was computed for all steps at once
    told: tuple[object, int] = field(default=(None, 0), init=False)  # of which timesteps, and how often in their run
    _kept_bytes: int = field(default=0, init=False)  # how much that was when the run ended
    _row_bytes: int = field(default=0, init=False)
    settled: list[torch.Tensor] = field(default_factory=list, init=False)  # where that stays, for who needs its address
    #: Whether lossless sites were last hoisted: what ``step`` says of them is then not so.
    hoisted: bool = field(default=False, init=False)
    on_host: bool = field(init=False)  # the values live in host memory, and the model elsewhere
    history: History = field(init=False)  # what the gates remember
    _released: list[int] = field(init=False)  # [site]: bytes that were held when the run ended
    _streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)
    #: How often all values were forgotten. Within an epoch a site stores once a step at most.
    epoch: int = field(default=0, init=False)
    loans: dict[int, Loan] = field(default_factory=dict, init=False)  # by site
    lender: Store | None = field(default=None, init=False)  # what the call that runs is compared with
    #: Where sites take turns (``lifetimes``): the memory of each place, who has it, and the place of each site.
    _memory: dict[int, _Buffers] = field(default_factory=dict, init=False)
    _holder: dict[int, int] = field(default_factory=dict, init=False)
    _place: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.buffers = [None] * len(self.specs)
        self._released = [0] * len(self.specs)
        self.step = [EMPTY] * len(self.specs)
        self.history = History([exits[0].device for exits in self.specs])
        self.on_host = any(spec.on_host for exits in self.specs for spec in exits)

    def of(self, site: int) -> _Buffers:
        """The buffers of a site, ``[exit][part]``, allocated if need be."""
        buffers = self.buffers[site]
        if buffers is None:
            buffers = self.buffers[site] = [spec.allocate() for spec in self.specs[site]]
            self._released[site] = 0
        return buffers

    def tensor(self, site: int, index: int, part: int) -> torch.Tensor:
        """One stored tensor of a site, its own or (``LENT``) the lender's; or where it writes what it measures."""
        if index >= 0:
            return self.of(site)[index][part]
        if index == MEASUREMENTS:
            return self.history.row(site)
        if index == DIFFERENCE:
            return self.history.difference_row(site)
        assert self.lender is not None
        return self.lender.of(site)[LENT - index][part]

    def move(self, places: Mapping[int, int]) -> None:
        """Give sites, which store now, memory by the number of a place; whoever had a place before has no value more.

        At any time no two sites have the same buffers. A place must always be given to sites with equal specs.
        """
        moving = {site: place for site, place in places.items() if self._holder.get(place) != site}
        for site in moving:
            if site in self._place:
                del self._holder[self._place.pop(site)]
                self.buffers[site] = None
        for site, place in moving.items():
            before = self._holder.get(place)
            if before is not None:
                del self._place[before]
                self.buffers[before], self.step[before] = None, EMPTY
            self._holder[place], self._place[site], self._released[site] = site, place, 0
            if place in self._memory:
                self.buffers[site] = self._memory[place]
            else:
                self._memory[place] = self.of(site)

    def borrow(self, site: int, lender: Store) -> None:
        """From here on the value of ``site`` is the lender's, until it stores another, or this store does."""
        loan = self.loans.get(site)
        self.loans[site] = Loan(lender, lender.epoch, self.buffers[site] if loan is None else loan.own)
        self.buffers[site] = lender.of(site)
        self.step[site] = lender.step[site]

    def holds_loan(self, site: int) -> bool:
        """True if the lender still has what was taken from it for ``site``."""
        lender, epoch, _ = self.loans[site]
        return lender.epoch == epoch and lender.step[site] == self.step[site]

    def give_back(self, site: int) -> None:
        """``site`` has its own buffers again; what it is said to hold is left for the caller to correct."""
        self.buffers[site] = self.loans.pop(site).own

    def give_all_back(self) -> None:
        """Let go of all that is another store's."""
        for site in list(self.loans):
            self.give_back(site)
        self.lender = None

    def stream_for(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream on which values are copied from and to ``device``; None where there are no streams."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self._streams[device]

    def clear(self) -> None:
        """Forget every value; the buffers stay."""
        self.give_all_back()
        self.epoch += 1
        self.step = [EMPTY] * len(self.specs)
        self.history.clear()
        self.kept = self.rows = None

    def release(self) -> None:
        """The run is over: free the buffers; how much they took is still known."""
        self.give_all_back()
        self._released = [self.site_bytes(site) for site in range(len(self.specs))]
        self._kept_bytes, self._row_bytes, self.settled = self.kept_bytes, self.row_bytes, []
        self.buffers = [None] * len(self.specs)
        for turns in (self._memory, self._holder, self._place):
            turns.clear()
        self.clear()

    @property
    def is_empty(self) -> bool:
        """True if no site has a value, though buffers may be allocated."""
        return all(step == EMPTY for step in self.step)

    def site_bytes(self, site: int) -> int:
        """Bytes of one site's stored value; after ``release``, what they were."""
        own = self.loans[site].own if site in self.loans else self.buffers[site]
        return _bytes(own or []) or self._released[site]

    @property
    def kept_bytes(self) -> int:
        """Bytes of what was computed once; after ``release``, what they were."""
        return self._kept_bytes if self.kept is None else self.kept.bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of what was computed for all steps at once; after ``release``, what they were."""
        return self._row_bytes if self.rows is None else self.rows.bytes

    @property
    def bytes(self) -> int:
        """Bytes of all stored values; after ``release``, what they were."""
        idle = [memory for place, memory in self._memory.items() if place not in self._holder]
        sites = sum(self.site_bytes(site) for site in range(len(self.specs)))
        return self.kept_bytes + self.row_bytes + sites + sum(map(_bytes, idle))


class AddressUsers(Protocol):
    """What relies on stores' addresses (``StepGraphs``)."""

    @property
    def is_on(self) -> bool:
        """True while it does."""

    def uses(self, store: Store) -> bool:
        """True if it relies on those of ``store``."""


class BufferPool:
    """Stores whose generation is over, kept with their buffers for the next one.

    Args:
        keeps_all: keep them in any case (``CacheConfig.keep_buffers``).

    Where ``users`` rely on addresses, those that they use are kept, and those of the last generation, which they may
    come to use.
    """

    def __init__(self, *, keeps_all: bool) -> None:
        self.users: AddressUsers | None = None
        self._keeps_all = keeps_all
        self._free: dict[Hashable, list[Store]] = {}
        self._lock = threading.Lock()

    @property
    def keeps(self) -> bool:
        """False if a store whose generation is over is to be freed instead."""
        return self._keeps_all or (self.users is not None and self.users.is_on)

    def take(self, key: Hashable) -> Store | None:
        """A store of this kind that nobody uses, or None."""
        with self._lock:
            free = self._free.get(key)
            return free.pop(0) if free else None  # in the order of giving: each branch is given its own again

    def give(self, stores: Sequence[tuple[Hashable, Store]]) -> None:
        """Hand in the stores of a generation; their values are forgotten."""
        for _, store in stores:
            store.clear()
            store.history.renew()
        with self._lock:
            if not self._keeps_all and self.users is not None:
                for free in self._free.values():
                    free[:] = filter(self.users.uses, free)
            for key, store in stores:
                self._free.setdefault(key, []).append(store)

    def clear(self) -> None:
        """Free all buffers."""
        with self._lock:
            self._free.clear()
