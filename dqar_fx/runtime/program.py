"""A captured graph as flat lists of compiled pieces, one list for each set of outcomes that a step may have."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

import torch
from torch import fx

from dqar_fx.config import CacheConfig
from dqar_fx.graph.ahead import computed_once, timestep_values, without_marks
from dqar_fx.graph.balancing import settle_balance
from dqar_fx.graph.calling import BoxedCallable
from dqar_fx.graph.capture import is_parameter, lift_constants, source_name, unwrap_scalars
from dqar_fx.graph.effects import has_late_size, must_keep, storages, written
from dqar_fx.graph.guard import ATTENTION, CHECKS, guard_sites
from dqar_fx.graph.looks import intermediate_looks
from dqar_fx.graph.lossless import Constant
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.measure import can_tell_entropy
from dqar_fx.graph.partition import Piece, partition
from dqar_fx.graph.share import share_repeated
from dqar_fx.graph.sites import Region
from dqar_fx.graph.specialise import (
    DIFFERENCE,
    LENT,
    MEASUREMENTS,
    WRITING,
    ExitLayout,
    Outcome,
    Variant,
    exit_layout,
    specialise,
)
from dqar_fx.graph.timestep_values import TimestepValues
from dqar_fx.runtime.cache import ExitSpec, Kept, Store
from dqar_fx.runtime.lossless import Hoisting, timestep_source
from dqar_fx.runtime.offload import Copies, Transfer
from dqar_fx.runtime.sizes import check_sizes, exit_spec, symbols_of
from dqar_fx.runtime.timestep_values import Calendar, TimestepTable

Outcomes = tuple[Outcome, ...]
_Gather = Callable[[Sequence[Any]], Sequence[Any]]
#: The sizes of a call, and whether it is in inference mode: what decides, beside the outcomes, which code runs.
_Modes = tuple[tuple[object, ...], bool]


class Kind(Enum):
    """What a program does about what stays the same during a generation."""

    PLAIN = "computes it in its place"
    KEEPS = "computes it first, and all of it, to be kept"
    GIVEN = "is given it"


#: Programs of one graph that are kept; a static schedule has a handful.
KEPT_PROGRAMS = 512


@dataclass(slots=True, eq=False)
class _Step:
    """A piece under given outcomes, placed: every value has the same register in all programs of a graph."""

    piece: Piece
    variant: Variant
    arguments: tuple[int, ...]  # registers, in calling order
    results: tuple[int, ...]
    #: The arguments that have a size, or are one, that another call of this program may have otherwise: the position,
    #: and what it looked like when it was captured.
    symbolic: tuple[tuple[int, Any], ...]
    found: tuple[tuple[int, int, int, int], ...]  # (register, site, exit, part): to be stored when it has run
    transfers: tuple[Transfer, ...]  # the stored tensors that it is given
    gather: _Gather
    #: By sizes and modes: what was compiled for them, and how its intermediate arguments looked.
    compiled: dict[Hashable, tuple[BoxedCallable, Hashable]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Program:
    """One set of outcomes, ready to run."""

    steps: list[_Step]
    freed: list[tuple[int, ...]]  # by step: intermediate values that nobody reads after it
    #: (compiled piece, what gathers its arguments, result registers, registers to free)
    compiled: list[tuple[BoxedCallable, _Gather, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    buffers: tuple[Transfer, ...] = field(init=False)
    #: Of these, the sites' own values, ready for the loop of every step: (register, site, exit, part); and the others.
    own: tuple[tuple[int, int, int, int], ...] = field(init=False)
    others: tuple[Transfer, ...] = field(init=False)
    found: tuple[tuple[int, int, int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.buffers = tuple(each for step in self.steps for each in step.transfers)
        self.own = tuple((use.register, use.site, use.exit, use.part) for use in self.buffers if use.exit >= 0)
        self.others = tuple(use for use in self.buffers if use.exit < 0)
        self.found = tuple(each for step in self.steps for each in step.found)

    @property
    def transfers(self) -> list[tuple[Transfer, ...]]:
        """Of each step, the stored values that go to and from host memory, if that is where they live."""
        return [tuple(t for t in step.transfers if t.exit != MEASUREMENTS) for step in self.steps]

    def stored(self, store: Store | None) -> list[torch.Tensor]:
        """The stored tensors that this program reads and writes where they are; allocates what is missing."""
        return [] if store is None else [store.tensor(use.site, use.exit, use.part) for use in self.buffers]

    def bind(self, store: Store | None, registers: list[Any]) -> None:
        """Put the stored tensors that this program reads and writes into place; allocates what is missing."""
        if store is None:
            return
        if not store.on_host:  # or they are brought when a piece needs them
            buffers = store.buffers
            for register, site, index, part in self.own:
                mine = buffers[site]
                registers[register] = (store.of(site) if mine is None else mine)[index][part]
        for use in self.others:
            if not store.on_host or use.exit == MEASUREMENTS:
                registers[use.register] = store.tensor(use.site, use.exit, use.part)

    def keep(self, registers: Sequence[Any], store: Store | None) -> None:
        """Store what could not be allocated before it was computed."""
        for register, site, index, part in self.found:
            assert store is not None
            exits, value = store.of(site), registers[register]
            parts = list(exits[index])
            if (parts[part].shape, parts[part].stride()) != (value.shape, value.stride()):
                with torch.inference_mode(False), torch.no_grad():
                    parts[part] = torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device=parts[part].device
                    )
                exits[index] = tuple(parts)
            parts[part].copy_(value)


class Runner(Protocol):
    """What may run a captured graph in its place."""

    def run(
        self,
        arguments: Sequence[Any],
        outcomes: Outcomes,
        store: Store | None,
        sizes: tuple[object, ...],
        kept: Kept | None = None,
    ) -> list[Any]:
        """See ``CapturedGraph.run``."""


class CapturedGraph:
    """One graph that Dynamo captured, rewritten, cut into pieces, and run.

    Args:
        gm: the graph as Dynamo gave it.
        regions: the sites to rewrite, in graph order.
        cache: how their exits are stored.
        lowerer: compiles pieces; shared by all graphs of a model.
        variants: the specialised pieces of all graphs of the model, so that equal blocks of two captures share code.
        measures: what a step that measures does: ``"entropy"`` of the attention, ``"change"`` of its exits.
        compares: whether exits may be compared with, and taken from, another branch of guidance.
        constant: picks the inputs that stay the same during a generation; None to hoist nothing.
        calendar: knows the timesteps of a run before it, as they are given to this graph; None if nobody does.
        num_steps: how many there are.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        regions: Sequence[Region],
        cache: CacheConfig,
        lowerer: Lowerer,
        variants: dict[object, Variant],
        measures: frozenset[str] = frozenset(),
        *,
        compares: bool = False,
        constant: Constant | None = None,
        calendar: Calendar | None = None,
        num_steps: int = 0,
    ) -> None:
        self.captured = gm
        self.guarded = guard_sites(gm, regions)
        lifted, self.constants = lift_constants(self.guarded)
        lifted, self._scalars = unwrap_scalars(lifted)
        #: The guarded graph as it is cut into pieces: its constants and numbers are inputs.
        self.lifted = lifted = share_repeated(lifted)
        #: The pieces of a step that hoists nothing, and those of one that does.
        self.plain: list[Piece] = partition(lifted, regions, fuse=True)
        nodes = {n.name: n for n in gm.graph.nodes}
        self._exits = [[nodes[name].meta["example_value"] for name in region.exits] for region in regions]
        #: What is computed for all steps at once; None where the timesteps are not known, or nothing pays.
        self.timed: TimestepValues | None = None
        if constant is not None and calendar is not None:
            self.timed = timestep_values(lifted, regions, constant, timestep_source, num_steps)
        hoisted = None
        if constant is not None:
            hoisted = computed_once(self.timed.gm if self.timed else lifted, regions, constant, self._exits)
            regions = without_marks(regions, hoisted)
        self.pieces = self.plain
        rest = hoisted or self.timed
        if rest is not None:
            self.pieces = partition(rest.gm, regions, fuse=True, hoisted=hoisted)
        self.regions = tuple(regions)
        self._lowerer = lowerer
        self._on_host = cache.device == "cpu"
        self._variants = variants
        self.measures = measures
        self._inputs = [n for n in lifted.graph.nodes if n.op == "placeholder"]
        self._late = {n.name: n.meta["example_value"] for n in lifted.graph.nodes if has_late_size(n)}
        self._result: Sequence[Any] = next(n for n in lifted.graph.nodes if n.op == "output").args[0]
        self._programs: dict[tuple[Outcomes, _Modes, Kind], Program] = {}
        self._steps: dict[Hashable, _Step] = {}
        exact = replace(cache, dtype="native", group=None, balance=None)  # INT8 would lose what a lossless site is for
        layouts = [
            [
                exit_layout(value, exact if region.site.lossless else cache, region.site.heads, region.batch, role)
                for value, role in zip(exits, region.roles or [""] * len(exits), strict=True)
            ]
            for region, exits in zip(regions, self._exits, strict=True)
        ]
        given = self._inputs[: len(self._inputs) - len(self.constants)]
        # State that the model itself writes at every call (a counter, a running mean) is no change from outside.
        own = frozenset().union(*(storages(w) for n in gm.graph.nodes for w in written(n)))
        self.parameters = tuple(
            i for i, n in enumerate(given) if is_parameter(n) and not _is_number(n) and not storages(n) & own
        )
        self._parameters_of = _getter(self.parameters)
        # Not every number is a size: where a timestep is a view into the scheduler's, its offset counts the steps.
        symbols = symbols_of(gm.graph.nodes)
        self.sizes = tuple(
            i for i, n in enumerate(given) if _is_number(n) and (n.users or str(n.meta.get("example_value")) in symbols)
        )
        self.sources = tuple(source_name(n) for n in given)
        #: What is computed once and kept; None where nothing pays.
        self.hoisting: Hoisting | None = None
        self.hoisted = hoisted
        self._kept: tuple[str, ...] = hoisted.kept if hoisted is not None else ()
        self._row: tuple[str, ...] = self.timed.names if self.timed is not None else ()
        if hoisted is not None or self.timed is not None:
            self.hoisting = Hoisting(
                sorted(hoisted.sites) if hoisted is not None else (),
                [i for i, n in enumerate(given) if hoisted is not None and n.name in hoisted.inputs],
                [i for i in self.parameters if hoisted is not None and given[i].name in hoisted.parameters],
                copies=lowerer.overwrites_results,
                keeps=hoisted is not None,
                table=self._table(self.timed, calendar) if self.timed is not None and calendar is not None else None,
            )
        self._specs: dict[tuple[object, ...], list[list[ExitSpec]]] = {}
        # A piece whose outputs nobody needs still runs if it writes into something.
        self._has_effects = {piece: _has_effects(piece.gm) for piece in {*self.plain, *self.pieces}}
        #: The sites whose attention can be measured: plain ones, in one piece with their guard.
        self.measurable = _measurable(self.plain) & _measurable(self.pieces)
        balanced = settle_balance(gm, regions, layouts, cache, self.measurable)
        self.layouts: list[list[ExitLayout]] = balanced.layouts
        self._factors = balanced.factors
        #: The sites that should be balanced (``CacheConfig.balance``) and are not, each with the reason.
        self.unbalanced = balanced.reasons
        #: The sites whose value a branch may take from another: not what depends on the prompt alone, nor what has a
        #: size of its own in each. Values in host memory are copied on streams that know nothing of each other.
        self.comparable = frozenset(
            i
            for i, region in enumerate(regions)
            if compares
            and not self._on_host
            and not region.site.lossless
            and not any(layout.late_size for layout in self.layouts[i])
        )
        self._entropy_bounds = [_entropy_bound([nodes[name] for name in region.attentions]) for region in regions]
        #: What runs it in its place, and puts whole steps into CUDA graphs; None where that is off.
        self.runner: Runner | None = None
        self._place()

    def _table(self, timed: TimestepValues, calendar: Calendar) -> TimestepTable:
        """What computes the values for all steps, from arguments and constants."""
        position = {n.name: i for i, n in enumerate(self._inputs)}
        inputs = [position[name] for name in timed.inputs]
        weights = sorted({*inputs}.intersection(self.parameters))
        first_constant = len(self._inputs) - len(self.constants)
        return TimestepTable(
            timed.table, calendar, self.constants, first_constant, inputs, position[timed.timestep], weights,
            timed.max_steps,
        )  # fmt: skip

    def _place(self) -> None:
        """Give every value its register: inputs, stored tensors, then intermediate values."""
        names = [n.name for n in self._inputs]
        stored: list[tuple[int, int, int]] = []
        for site, layouts in enumerate(self.layouts):
            stored += [(site, index, part) for index, layout in enumerate(layouts) for part in range(layout.parts)]
            stored.append((site, MEASUREMENTS, 0))
            if site in self.comparable:
                stored.append((site, DIFFERENCE, 0))
                stored += [(site, LENT - index, part) for index, lay in enumerate(layouts) for part in range(lay.parts)]
        made = list(
            dict.fromkeys((*self._kept, *self._row, *(n for p in (*self.plain, *self.pieces) for n in p.outputs)))
        )
        constants = [value for value in self._result if not isinstance(value, fx.Node)]
        self._stored = {use: i for i, use in enumerate(stored, len(names))}
        self._found = {use: i for i, use in enumerate(stored, len(names) + len(stored))}
        self._first_made = len(names) + 2 * len(stored)
        first_of_row = self._first_made + len(self._kept)
        self._kept_registers = slice(self._first_made, first_of_row)
        self._row_registers = slice(first_of_row, first_of_row + len(self._row))
        self._register = {name: i for i, name in enumerate(names)}
        self._register.update({name: i for i, name in enumerate(made, self._first_made)})
        first_constant = iter(range(self._first_made + len(made), self._first_made + len(made) + len(constants)))
        self._returned = [
            self._register[value.name] if isinstance(value, fx.Node) else next(first_constant) for value in self._result
        ]
        self._blank = [None] * (2 * len(stored) + len(made)) + constants

    @property
    def num_sites(self) -> int:
        """Attention sites in this graph."""
        return len(self.regions)

    @property
    def has_late_sizes(self) -> bool:
        """True if the size of a value is known only when the graph runs (``nonzero``, a boolean mask, ``item``)."""
        return bool(self._late)

    def can_measure(self, site: int) -> bool:
        """True if what is asked for (``measures``) can be measured at ``site``, or a part of it, and matters there."""
        if self.regions[site].site.lossless:
            return False
        change = "change" in self.measures and not all(layout.late_size for layout in self.layouts[site])
        return change or (site in self.measurable and bool(self.measures - {"change"}))

    def entropy_bound(self, site: int) -> float:
        """``ln(keys)`` of the attention at ``site``, infinity where it is not known before it runs."""
        return self._entropy_bounds[site]

    def parameters_of(self, arguments: Sequence[Any]) -> Sequence[torch.Tensor]:
        """Those of a call's arguments that are the model's own state."""
        return self._parameters_of(arguments)

    def sizes_of(self, arguments: Sequence[Any]) -> tuple[object, ...]:
        """The sizes, and other numbers, that this call has where the graph was captured with symbolic ones."""
        sizes = (arguments[i] for i in self.sizes)
        return tuple(s.item() if isinstance(s, torch.Tensor) else s for s in sizes)  # on the host: no device is read

    def specs(self, sizes: tuple[object, ...]) -> list[list[ExitSpec]]:
        """What to allocate for each exit, ``[site][exit]``, at the given sizes."""
        specs = self._specs.get(sizes)
        if specs is None:
            values = {
                str(self._inputs[i].meta["example_value"]): size
                for i, size in zip(self.sizes, sizes, strict=True)
                if isinstance(size, int)
            }
            specs = self._specs[sizes] = [
                [
                    exit_spec(value, layout, values, self._on_host, self._factors.get((site, index)), region.site)
                    for index, (value, layout) in enumerate(zip(exits, layouts, strict=True))
                ]
                for site, (exits, layouts, region) in enumerate(
                    zip(self._exits, self.layouts, self.regions, strict=True)
                )
            ]
        return specs

    def run(
        self,
        arguments: Sequence[Any],
        outcomes: Outcomes,
        store: Store | None,
        sizes: tuple[object, ...],
        kept: Kept | None = None,
    ) -> list[Any]:
        """Run the graph, one outcome for each site; compiles what a combination needs when it first occurs.

        ``kept``: the hoisted values, or where to put them once they are computed; None to hoist nothing.
        Returns what the captured graph returns, in the same order.
        """
        modes = (sizes, torch.is_inference_mode_enabled())
        values = kept.values if kept is not None else None
        kind = Kind.PLAIN if kept is None else Kind.KEEPS if values is None else Kind.GIVEN
        program = self._programs.get((outcomes, modes, kind)) or self._program(outcomes, modes, kind)
        registers = [*arguments, *self.constants, *self._blank]
        program.bind(store, registers)
        if values is not None:
            registers[self._kept_registers] = values
        if kept is not None:
            registers[self._row_registers] = kept.row
        for i in self._scalars:
            registers[i] = registers[i].item()
        copies = Copies(store, program.transfers) if store is not None and store.on_host else None
        if not program.compiled or copies is not None:
            self._run_apart(program, modes, registers, copies)
        else:
            for function, arguments_of, outputs, freed in program.compiled:
                given = list(arguments_of(registers))
                for i in freed:
                    registers[i] = None
                for i, value in zip(outputs, function(given)):  # noqa: B905  # the hot loop; checked at the first run
                    registers[i] = value
        program.keep(registers, store)
        if kept is not None and values is None:
            kept.values = registers[self._kept_registers]
        return [registers[i] for i in self._returned]

    def _program(self, outcomes: Outcomes, modes: _Modes, kind: Kind) -> Program:
        program = self._programs[outcomes, modes, kind] = self.build(outcomes, kind)
        if len(self._programs) > KEPT_PROGRAMS:  # gates make any combination of outcomes; the oldest goes
            del self._programs[next(iter(self._programs))]
        return program

    def prepare(
        self, outcomes: Outcomes, store: Store | None, sizes: tuple[object, ...], given: Sequence[torch.Tensor] | None
    ) -> tuple[Program, list[torch.Tensor]]:
        """The program that ``run`` would run, and all tensors that it would use where they are, besides its arguments
        and the graph's constants: a step that is recorded is the same only as long as these are. ``given``: the hoisted
        values, None where nothing is hoisted."""
        modes = (sizes, torch.is_inference_mode_enabled())
        kind = Kind.PLAIN if given is None else Kind.GIVEN
        program = self._programs.get((outcomes, modes, kind)) or self._program(outcomes, modes, kind)
        return program, [*program.stored(store), *(given or ())]

    def programs(self, outcomes: Outcomes) -> list[Program]:
        """The programs that have run for ``outcomes``: one for each set of sizes and modes, and kind."""
        return [program for (done, _, _), program in self._programs.items() if done == outcomes]

    def _run_apart(self, program: Program, modes: _Modes, registers: list[Any], copies: Copies | None) -> None:
        """Run a program for the first time, compiling what is new, or with its stored values in host memory."""
        if copies is None:
            self._compile_together(program, modes, registers)
        compiled = []
        for index, (step, freed) in enumerate(zip(program.steps, program.freed, strict=True)):
            if copies is not None:
                copies.bring(index, registers)
            given = [registers[i] for i in step.arguments]
            function = program.compiled[index][0] if program.compiled else self._function(step, modes, given)
            for i in freed:
                registers[i] = None
            for i, value in zip(step.results, function(given), strict=True):
                registers[i] = value
            if copies is not None:
                copies.take(index, registers)
            compiled.append((self._lowerer.direct(function), step.gather, step.results, freed))
        program.compiled = compiled  # only now: an exception on the way leaves the program to be built again

    def _compile_together(self, program: Program, modes: _Modes, registers: Sequence[Any]) -> None:
        """Compile what is new in ``program``, for the CPU, in one go; each piece for arguments as they will be.

        How intermediate values will look is found on fake tensors. Where they come out otherwise, the piece is compiled
        again for them as it runs, and where that cannot be told, it is compiled when it runs.
        """
        if self._late or not self._lowerer.overlaps:
            return
        if len({id(step.variant) for step in program.steps if modes not in step.compiled}) < 2:
            return
        looks = intermediate_looks(
            [(step.variant.gm, step.arguments, step.results) for step in program.steps], registers
        )
        with self._lowerer.overlapping():
            for step, made in zip(program.steps, looks, strict=False):
                if modes not in step.compiled and not step.symbolic:
                    self._function(step, modes, [made[i]() if i in made else registers[i] for i in step.arguments])

    def _function(self, step: _Step, modes: _Modes, given: Sequence[Any]) -> BoxedCallable:
        """``step``, compiled for arguments like these. All but the intermediate ones are what they were for ``modes``:
        Dynamo guards the inputs, and what is stored is allocated by their sizes."""
        made = [value for i, value in zip(step.arguments, given, strict=True) if i >= self._first_made]
        looks = tuple((v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v for v in made)
        known = step.compiled.get(modes)
        if known is None or known[1] != looks:
            function = self._by_sizes(step) if step.symbolic else self._lowerer.lower(step.variant, given)
            known = step.compiled[modes] = (function, looks)
        return known[0]

    def _by_sizes(self, step: _Step) -> BoxedCallable:
        """``step``, compiled for each set of sizes that it is given."""
        variant, symbolic = step.variant, step.symbolic

        def run(given: list[Any]) -> Sequence[Any]:
            check_sizes(symbolic, given)
            return self._lowerer.lower(variant, given)(given)

        return run

    def build(self, outcomes: Outcomes, kind: Kind = Kind.PLAIN) -> Program:
        """Choose a variant for each piece, last to first, so that nothing is computed that nobody reads."""
        needed = {n.name for n in self._result if isinstance(n, fx.Node)}
        alive = set(self._returned)
        if kind is Kind.KEEPS:
            needed.update(self._kept)
            alive.update(self._register[name] for name in self._kept)
        chosen: list[_Step] = []
        for piece in reversed(self.plain if kind is Kind.PLAIN else self.pieces):
            if piece.hoisted and kind is Kind.GIVEN:
                break
            outputs = tuple(i for i, name in enumerate(piece.outputs) if name in needed)
            mine = tuple(outcomes[site] for site in piece.sites)
            reused = frozenset(i for i, site in enumerate(piece.checked) if outcomes[site] is Outcome.REUSE)
            checks = len(reused) < len(piece.checked)
            if not outputs and not self._has_effects[piece] and not checks and not WRITING.intersection(mine):
                continue
            step = self._steps.get((piece, mine, outputs, reused))
            if step is None:
                step = self._steps[piece, mine, outputs, reused] = self._step(piece, mine, outputs, reused)
            needed.update(piece.inputs[i] for i in step.variant.inputs)
            chosen.append(step)
        chosen.reverse()
        freed: list[tuple[int, ...]] = []
        for step in reversed(chosen):
            freed.append(tuple(i for i in {*step.arguments} - alive if i >= self._first_made))
            alive.update(step.arguments)
        freed.reverse()
        return Program(chosen, freed)

    def _step(self, piece: Piece, mine: Outcomes, outputs: tuple[int, ...], reused: frozenset[int]) -> _Step:
        """``piece`` under the outcomes of its sites, and where its arguments and results are."""
        layouts = tuple(tuple(self.layouts[site]) for site in piece.sites)
        key = (piece.key, mine, layouts, outputs, reused, self.measures)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = specialise(piece.gm, mine, layouts, outputs, reused, self.measures)
        names = [piece.inputs[i] for i in variant.inputs]
        uses = [(piece.sites[use.guard], use.exit, use.part) for use in variant.buffers]
        found = [(piece.sites[use.guard], use.exit, use.part) for use in variant.found]
        symbolic = [(i, self._late[name]) for i, name in enumerate(names) if name in self._late]
        for i, (site, index, part) in enumerate(uses, len(names)):
            if index >= 0 and self.layouts[site][index].late_size:
                symbolic.append((i, self._exits[site][index] if part == 0 else None))
        arguments = (*(self._register[name] for name in names), *(self._stored[use] for use in uses))
        results = (*(self._register[piece.outputs[i]] for i in variant.outputs), *(self._found[use] for use in found))
        outcome = dict(zip(piece.sites, mine, strict=True))
        read = [
            outcome[site] is Outcome.REUSE or (index >= 0 and part >= self.layouts[site][index].written)
            for site, index, part in uses
        ]
        return _Step(
            piece,
            variant,
            arguments,
            results,
            tuple(symbolic),
            tuple((self._found[use], *use) for use in found),
            tuple(Transfer(self._stored[use], *use, reads) for use, reads in zip(uses, read, strict=True)),
            _getter(arguments),
        )


def _measurable(pieces: Sequence[Piece]) -> frozenset[int]:
    return frozenset(
        piece.sites[n.meta[ATTENTION]] for piece in pieces for n in piece.gm.graph.nodes if ATTENTION in n.meta
    )


def _getter(registers: tuple[int, ...]) -> _Gather:
    """What picks these registers: one call into C, where there are several (a single one comes without a tuple)."""
    if len(registers) > 1:
        return operator.itemgetter(*registers)
    return lambda values: [values[i] for i in registers]


def _entropy_bound(attentions: Sequence[fx.Node]) -> float:
    """The largest entropy that these can have on average: that of equal weights for all keys."""
    bounds = []
    for node in attentions:
        key = node.args[1] if len(node.args) > 1 else node.kwargs.get("key")
        keys = key.meta["example_value"].shape[-2] if isinstance(key, fx.Node) and can_tell_entropy(node) else None
        bounds.append(math.log(keys) if isinstance(keys, int) and keys > 0 else math.inf)
    return max(bounds, default=math.inf)


def _has_effects(gm: fx.GraphModule) -> bool:
    nodes = (n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and CHECKS not in n.meta)
    return any(written(n) or must_keep(n) for n in nodes)


def _is_number(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("example_value"), torch.Tensor)
