"""A captured graph as flat lists of compiled pieces, one list for each set of outcomes that a step may have."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx

from dqar_fx.config import CacheConfig
from dqar_fx.graph.capture import is_parameter, lift_constants, source_name, unwrap_scalars
from dqar_fx.graph.effects import has_late_size, must_keep, storages, written
from dqar_fx.graph.guard import CHECKS, guard_sites
from dqar_fx.graph.lower import BoxedCallable, Lowerer
from dqar_fx.graph.partition import Piece, partition
from dqar_fx.graph.share import share_repeated
from dqar_fx.graph.sites import Region
from dqar_fx.graph.specialise import ExitLayout, Outcome, Variant, exit_layout, specialise
from dqar_fx.runtime.cache import ExitSpec, Store
from dqar_fx.runtime.lossless import Lossless
from dqar_fx.runtime.offload import Copies, Transfer
from dqar_fx.runtime.sizes import check_sizes, exit_spec, symbols_of

Outcomes = tuple[Outcome, ...]
_Gather = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(slots=True)
class _Step:
    variant: Variant
    arguments: tuple[int, ...]  # registers, in calling order
    results: tuple[int, ...]
    #: The arguments that have a size, or are one, that another call of this program may have otherwise: the position,
    #: and what it looked like when it was captured.
    symbolic: tuple[tuple[int, Any], ...]
    freed: tuple[int, ...]  # intermediate values that nobody reads after this (inputs are held by the caller anyway)


@dataclass(slots=True, eq=False)
class Program:
    """One set of outcomes, ready to run: registers are inputs, constants, stored tensors, then intermediate values."""

    steps: list[_Step]
    buffers: tuple[tuple[int, int, int], ...]  # (site, exit, part)
    results: tuple[int, ...]
    scratch: list[Any]  # initial content of the registers behind the stored tensors
    found: tuple[tuple[int, int, int, int], ...]  # (register, site, exit, part): to be stored when it has run
    transfers: tuple[tuple[Transfer, ...], ...]  # of each step: the stored tensors that it is given
    #: (compiled piece, what gathers its arguments, result registers, registers to free)
    compiled: list[tuple[BoxedCallable, _Gather, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def bind(self, store: Store | None) -> list[torch.Tensor]:
        """The stored tensors that this program reads and writes, in register order; allocates what is missing."""
        if store is None or not self.buffers:
            return []
        if store.on_host:
            return [cast(torch.Tensor, None)] * len(self.buffers)  # brought when a piece needs them
        return [store.of(site)[index][part] for site, index, part in self.buffers]

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


class CapturedGraph:
    """One graph that Dynamo captured, rewritten, cut into pieces, and run.

    Args:
        gm: the graph as Dynamo gave it.
        regions: the sites to rewrite, in graph order.
        cache: how their exits are stored.
        lowerer: compiles pieces; shared by all graphs of a model.
        variants: the specialised pieces of all graphs of the model, so that equal blocks of two captures share code.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        regions: Sequence[Region],
        cache: CacheConfig,
        lowerer: Lowerer,
        variants: dict[object, Variant],
    ) -> None:
        self.captured = gm
        self.regions = tuple(regions)
        self.guarded = guard_sites(gm, regions)
        lifted, self.constants = lift_constants(self.guarded)
        lifted, self._scalars = unwrap_scalars(lifted)
        lifted = share_repeated(lifted)
        self.pieces: list[Piece] = partition(lifted, regions, fuse=True)
        self._lowerer = lowerer
        self._on_host = cache.device == "cpu"
        self._variants = variants
        self._inputs = [n for n in lifted.graph.nodes if n.op == "placeholder"]
        self._late = {n.name: n.meta["example_value"] for n in lifted.graph.nodes if has_late_size(n)}
        self._result: Sequence[Any] = next(n for n in lifted.graph.nodes if n.op == "output").args[0]
        self._programs: dict[tuple[Outcomes, tuple[object, ...], bool], Program] = {}
        nodes = {n.name: n for n in gm.graph.nodes}
        exact = replace(cache, dtype="native", group=None)  # INT8 would lose what a lossless site is for
        self._exits = [[nodes[name].meta["example_value"] for name in region.exits] for region in regions]
        self.layouts: list[list[ExitLayout]] = [
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
        lossless = [i for i, region in enumerate(regions) if region.site.lossless]
        needed = {name for region in regions for name in region.inputs}
        self.lossless = Lossless(lossless, [i for i, n in enumerate(given) if n.name in needed]) if lossless else None
        self._specs: dict[tuple[object, ...], list[list[ExitSpec]]] = {}
        # A piece whose outputs nobody needs still runs if it writes into something.
        self._has_effects = [_has_effects(piece.gm) for piece in self.pieces]

    @property
    def num_sites(self) -> int:
        """Attention sites in this graph."""
        return len(self.regions)

    @property
    def has_late_sizes(self) -> bool:
        """True if the size of a value is known only when the graph runs (``nonzero``, a boolean mask, ``item``)."""
        return bool(self._late)

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
                [exit_spec(value, layout, values, self._on_host) for value, layout in zip(exits, layouts, strict=True)]
                for exits, layouts in zip(self._exits, self.layouts, strict=True)
            ]
        return specs

    def run(
        self, arguments: Sequence[Any], outcomes: Outcomes, store: Store | None, sizes: tuple[object, ...]
    ) -> list[Any]:
        """Run the graph, one outcome for each site; compiles what a combination needs when it first occurs.

        Returns what the captured graph returns, in the same order.
        """
        key = (outcomes, sizes, torch.is_inference_mode_enabled())
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self.build(outcomes)
        registers = [*arguments, *self.constants, *program.bind(store), *program.scratch]
        for i in self._scalars:
            registers[i] = registers[i].item()
        copies = Copies(store, program.transfers) if store is not None and store.on_host else None
        if not program.compiled or copies is not None:
            return self._run_apart(program, registers, store, copies)
        for function, arguments_of, outputs, freed in program.compiled:
            given = list(arguments_of(registers))
            for i in freed:
                registers[i] = None
            for i, value in zip(outputs, function(given)):  # noqa: B905  # the hot loop; checked at the first run
                registers[i] = value
        program.keep(registers, store)
        return [registers[i] for i in program.results]

    def _run_apart(
        self, program: Program, registers: list[Any], store: Store | None, copies: Copies | None
    ) -> list[Any]:
        """Run a program for the first time, compiling it, or with its stored values in host memory."""
        compiled = []
        for index, step in enumerate(program.steps):
            if copies is not None:
                copies.bring(index, registers)
            given = [registers[i] for i in step.arguments]
            if program.compiled:
                function = program.compiled[index][0]
            else:
                function = self._by_sizes(step) if step.symbolic else self._lowerer.lower(step.variant, given)
            for i in step.freed:
                registers[i] = None
            for i, value in zip(step.results, function(given), strict=True):
                registers[i] = value
            if copies is not None:
                copies.take(index, registers)
            compiled.append((function, _getter(step.arguments), step.results, step.freed))
        program.compiled = compiled  # only now: an exception on the way leaves the program to be built again
        program.keep(registers, store)
        return [registers[i] for i in program.results]

    def _by_sizes(self, step: _Step) -> BoxedCallable:
        """``step``, compiled for each set of sizes that it is given."""
        variant, symbolic = step.variant, step.symbolic

        def run(given: list[Any]) -> Sequence[Any]:
            check_sizes(symbolic, given)
            return self._lowerer.lower(variant, given)(given)

        return run

    def build(self, outcomes: Outcomes) -> Program:
        """Choose a variant for each piece, last to first, so that nothing is computed that nobody reads."""
        needed = {n.name for n in self._result if isinstance(n, fx.Node)}
        chosen: list[tuple[Piece, Variant]] = []
        for piece, has_effects in zip(reversed(self.pieces), reversed(self._has_effects), strict=True):
            outputs = tuple(i for i, name in enumerate(piece.outputs) if name in needed)
            mine = tuple(outcomes[site] for site in piece.sites)
            reused = frozenset(i for i, site in enumerate(piece.checked) if outcomes[site] is Outcome.REUSE)
            checks = len(reused) < len(piece.checked)
            if not outputs and not has_effects and not checks and Outcome.STORE not in mine:
                continue
            layouts = tuple(tuple(self.layouts[site]) for site in piece.sites)
            key = (piece.key, mine, layouts, outputs, reused)
            variant = self._variants.get(key)
            if variant is None:
                variant = self._variants[key] = specialise(piece.gm, mine, layouts, outputs, reused)
            needed |= {piece.inputs[i] for i in variant.inputs}
            chosen.append((piece, variant))
        chosen.reverse()
        return self._allocate(chosen, outcomes)

    def _allocate(self, chosen: list[tuple[Piece, Variant]], outcomes: Outcomes) -> Program:
        """Give every value a register and note where it is read for the last time."""
        register = {n.name: i for i, n in enumerate(self._inputs)}
        buffers = [(p.sites[use.guard], use.exit, use.part) for p, v in chosen for use in v.buffers]
        first_buffer = len(register)
        first_scratch = first_buffer + len(buffers)
        scratch: list[Any] = []
        steps: list[_Step] = []
        found: list[tuple[int, int, int, int]] = []
        transfers: list[tuple[Transfer, ...]] = []
        next_buffer = first_buffer
        for piece, variant in chosen:
            arguments = [register[piece.inputs[i]] for i in variant.inputs]
            arguments += range(next_buffer, next_buffer + len(variant.buffers))
            transfers.append(
                tuple(
                    Transfer(number, site, use.exit, use.part, outcomes[site] is Outcome.REUSE)
                    for number, use in enumerate(variant.buffers, next_buffer)
                    for site in (piece.sites[use.guard],)
                )
            )
            next_buffer += len(variant.buffers)
            results = []
            for i in variant.outputs:
                register[piece.outputs[i]] = first_scratch + len(scratch)
                results.append(first_scratch + len(scratch))
                scratch.append(None)
            for use in variant.found:
                results.append(first_scratch + len(scratch))
                found.append((results[-1], piece.sites[use.guard], use.exit, use.part))
                scratch.append(None)
            late = [
                (i, self._late[n]) for i, n in enumerate(piece.inputs[i] for i in variant.inputs) if n in self._late
            ]
            for i, use in enumerate(variant.buffers, len(variant.inputs)):
                site = piece.sites[use.guard]
                if self.layouts[site][use.exit].late_size:
                    late.append((i, self._exits[site][use.exit] if use.part == 0 else None))
            steps.append(_Step(variant, tuple(arguments), tuple(results), tuple(late), ()))
        final = []
        for value in self._result:
            if isinstance(value, fx.Node):
                final.append(register[value.name])
            else:
                final.append(first_scratch + len(scratch))
                scratch.append(value)
        alive = set(final)
        for step in reversed(steps):
            step.freed = tuple(sorted(i for i in {*step.arguments} - alive if i >= first_scratch))
            alive |= set(step.arguments)
        return Program(steps, tuple(buffers), tuple(final), scratch, tuple(found), tuple(transfers))


def _getter(registers: tuple[int, ...]) -> _Gather:
    """What picks these registers: one call into C, where there are several (a single one comes without a tuple)."""
    if len(registers) > 1:
        return operator.itemgetter(*registers)
    return lambda values: [values[i] for i in registers]


def _has_effects(gm: fx.GraphModule) -> bool:
    nodes = (n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and CHECKS not in n.meta)
    return any(written(n) or must_keep(n) for n in nodes)


def _is_number(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("example_value"), torch.Tensor)
