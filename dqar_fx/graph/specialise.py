"""A piece under one given outcome of each of its guards, with all that became dead removed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dqar_fx.balance import fold_into_query, key_factors, output_factors, query_salience, salience
from dqar_fx.config import DYNAMIC, CacheConfig
from dqar_fx.graph.attentions import attend_with, is_attention, query_of
from dqar_fx.graph.capture import fork
from dqar_fx.graph.effects import eliminate_dead_code, storages, written
from dqar_fx.graph.guard import ATTENTION, CHECKS, guard_nodes, guard_number
from dqar_fx.graph.measure import change_of, entropy_of, put_entropy
from dqar_fx.quantize import dequantize_from, pack_over, quantize_over, reduced_dims, unpack_from


class Outcome(Enum):
    """What a guard does at one step."""

    COMPUTE = "compute"
    STORE = "compute+store"
    MEASURE = "compute+store+measure"
    OBSERVE = "compute+measure"
    REUSE = "reuse"
    # The same, and compare with what another branch of guidance has stored at this step.
    COMPARE = "compute+compare"
    STORE_COMPARE = "compute+store+compare"
    MEASURE_COMPARE = "compute+store+measure+compare"
    OBSERVE_COMPARE = "compute+measure+compare"


#: What an outcome becomes where it compares as well.
COMPARED = {
    Outcome.COMPUTE: Outcome.COMPARE,
    Outcome.STORE: Outcome.STORE_COMPARE,
    Outcome.MEASURE: Outcome.MEASURE_COMPARE,
    Outcome.OBSERVE: Outcome.OBSERVE_COMPARE,
}
COMPARING = frozenset(COMPARED.values())
MEASURING = frozenset((Outcome.MEASURE, Outcome.MEASURE_COMPARE, Outcome.OBSERVE, Outcome.OBSERVE_COMPARE))
#: ``ExitLayout.balance`` with factors that are there before the first store.
GIVEN = "given"
#: The outcomes that write what is stored.
STORING = frozenset((Outcome.STORE, Outcome.STORE_COMPARE, Outcome.MEASURE, Outcome.MEASURE_COMPARE))
#: The outcomes that write anything.
WRITING = STORING | COMPARING | MEASURING
#: In place of an exit: the row of what was measured (see ``measure``), and that of how far two branches are apart.
MEASUREMENTS, DIFFERENCE = -1, -2
#: Exit ``i`` as another branch has stored it is ``LENT - i``.
LENT = -3


@dataclass(frozen=True, slots=True)
class BufferUse:
    """A stored tensor that a variant reads or writes: guard (within the piece), exit, part (0: values, 1: scales, 2:
    balancing factors).

    Exits ``MEASUREMENTS`` and ``DIFFERENCE`` are the guard's rows, ``LENT - i`` is exit ``i`` of another branch.
    """

    guard: int
    exit: int
    part: int


@dataclass(frozen=True, eq=False)
class Variant:
    """A piece specialised.

    Attributes:
        gm: called with ``inputs`` (positions in the piece's inputs) and then ``buffers``; returns the kept ``outputs``.
        inputs: positions, in the piece's inputs, of those that it still needs.
        buffers: the stored tensors it reads or writes, in calling order.
        outputs: positions, in the piece's outputs, of those that it returns.
        found: stored tensors that it returns behind its outputs: nobody could allocate them before.
    """

    gm: fx.GraphModule
    inputs: tuple[int, ...]
    buffers: tuple[BufferUse, ...]
    outputs: tuple[int, ...]
    found: tuple[BufferUse, ...] = ()


@dataclass(frozen=True, slots=True)
class ExitLayout:
    """How one exit is stored: the questions of ``CacheConfig`` settled for a given tensor."""

    dtype: torch.dtype
    ndim: int
    granularity: str  # "" for native
    num_heads: int | None
    late_size: bool = False  # how large it is, is known only when it was computed
    size: int = 0  # of the last dimension, where two values are packed into a byte; 0 where they are not
    group: int = 0  # ... of which so many share a scale
    #: Channel-wise salience balancing: "", "dynamic" (factors are found, and stored, with the values) or "given".
    balance: str = ""
    of_keys: bool = False  # ... of keys, each of whose heads meets so many of the queries:
    groups: int = 1

    @property
    def parts(self) -> int:
        """How many tensors are stored: the values, the scales if there are any, and the balancing factors if any."""
        return (2 if self.granularity else 1) + bool(self.balance)

    @property
    def written(self) -> int:
        """How many of them a store writes, the first ones; calibrated factors are there before it."""
        return 2 if self.balance == GIVEN else self.parts

    def pack(self, x: torch.Tensor, *beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is stored of ``x``: itself, or values and scales and, where they are found with them, factors.

        ``beside``: where it is balanced, the given factors; for dynamic ones of keys, the queries.
        """
        factors: tuple[torch.Tensor, ...] = beside
        if self.balance == DYNAMIC and self.of_keys:
            factors = (key_factors(salience(x, -2), query_salience(beside[0], self.groups)),)
        elif self.balance == DYNAMIC:
            factors = (output_factors(salience(x, -2)),)
        if self.balance:
            x = x.float() * factors[0]
        if not self.granularity:
            return (x,)
        found = factors if self.balance == DYNAMIC else ()
        if self.size:
            return (*pack_over(x, self.size, self.group), *found)
        dims = reduced_dims(self.ndim, self.granularity, self.num_heads)
        return (*quantize_over(x, dims, self.num_heads), *found)

    def unpack(
        self, q: torch.Tensor, scale: torch.Tensor, *factors: torch.Tensor, folded: bool = False
    ) -> torch.Tensor:
        """What was quantised, as it was; ``folded``: still balanced, for somebody who undoes it in the queries."""
        undone = bool(self.balance) and not folded
        dtype = torch.float32 if undone else self.dtype
        if self.size:
            x = unpack_from(q, scale, dtype, self.size, self.group)
        else:
            x = dequantize_from(q, scale, dtype, self.num_heads)
        return (x / factors[0]).to(self.dtype) if undone else x


def exit_layout(
    value: torch.Tensor, cache: CacheConfig, heads: int | None, batch: object, role: str = ""
) -> ExitLayout:
    """Settle how an exit is stored. ``batch`` is the attention's batch size (first dimension of its query).

    ``role`` is that of keys and values, ``[B, H, N, D]``: these have heads of their own (fewer than the queries', where
    several share one).

    Scales that span more than one token must not span samples; where the first dimension of the exit is not the
    attention's batch (a sequence-first layout), scales are taken per token, which is right in any layout. What cannot
    be packed into INT4 (its channels are not adjacent in memory, or their number is open) is stored in INT8.
    """
    late_size = bool(free_unbacked_symbols([value]))
    if role:
        heads = value.shape[1] if value.ndim == 4 else None
    if cache.dtype_of(role) == "native":
        return ExitLayout(value.dtype, value.ndim, "", None, late_size)
    if cache.dtype_of(role) == "int4" and _can_pack(value):
        size = int(value.shape[-1])
        group = min(cache.group or size, size)
        return ExitLayout(value.dtype, value.ndim, "token", None, late_size, size, group)
    if late_size:  # which dimension is the batch cannot be told by its size
        return ExitLayout(value.dtype, value.ndim, "token", None, late_size)
    granularity = cache.granularity
    if granularity != "token" and value.shape[0] != batch:
        granularity = "token"
    num_heads = None
    if granularity == "head":
        if value.ndim == 3 and heads and value.shape[-1] % heads == 0:
            num_heads = heads
        elif value.ndim != 4 or value.shape[1] != heads:
            granularity = "token"
    return ExitLayout(value.dtype, value.ndim, granularity, num_heads)


def _can_pack(value: torch.Tensor) -> bool:
    return type(value.shape[-1]) is int and type(value.stride(-1)) is int and value.stride(-1) == 1  # no symbols


def specialise(
    gm: fx.GraphModule,
    outcomes: Sequence[Outcome],
    layouts: Sequence[Sequence[ExitLayout]],
    outputs: Sequence[int],
    reused: frozenset[int] = frozenset(),
    measures: frozenset[str] = frozenset(),
) -> Variant:
    """Give every guard its outcome and drop what is then dead; ``gm`` is left as it was.

    Before::   a = attn(norm(x)); g = reuse_or_compute(0, a); y = x + g[0]
    compute::  a = attn(norm(x)); y = x + a
    store::    a = attn(norm(x)); q, s = quantize(a); q_0.copy_(q); s_0.copy_(s); y = x + a
    measure::  as store, and row_0.copy_([entropy of attn, |a - dequantize(q_0, s_0)| / |a|, ...]) before it
    observe::  as compute, and row_0.copy_([entropy of attn, nan, ...])
    compare::  as one of these four, and row_0.copy_(|a - dequantize(q_1, s_1)| / |a|), of what another branch stored
    reuse::    y = x + dequantize(q_0, s_0)

    A compute step hands on the fresh value, never its quantised copy. Quantise and dequantise are plain operations of
    the graph, so that a compiler fuses them into their neighbours. Stored tensors are extra inputs, written in place:
    their addresses never change; one whose size is found only by computing it is returned instead. ``outputs`` are the
    positions of the outputs that somebody will read. An assertion about what is inside an attention goes where that is
    not computed: ``reused`` are those of the piece's ``checked`` sites. ``measures``: what a guard that measures does.
    """
    out = fork(gm)
    graph = out.graph
    result = next(n for n in graph.nodes if n.op == "output")
    kept = tuple(outputs)
    returned = cast(tuple[fx.Node, ...], result.args[0])  # a piece returns a tuple
    result.args = (tuple(returned[i] for i in kept),)
    uses: list[BufferUse] = []
    found: dict[BufferUse, fx.Node] = {}
    guards = guard_nodes(graph)
    attended = {item for guard in guards for item in guard.users if _only_attended(item)}
    for guard, outcome, parts in zip(guards, outcomes, layouts, strict=True):
        number = guard_number(guard)
        stored: dict[int, list[fx.Node]] = {}
        for index, layout in enumerate(parts):
            stored[index] = []
            if outcome is Outcome.REUSE or (outcome in STORING and not layout.late_size):
                for part in range(layout.parts):
                    stored[index].append(_buffer(graph, len(uses)))
                    uses.append(BufferUse(number, index, part))
        if outcome in MEASURING and measures:
            row = _buffer(graph, len(uses))
            uses.append(BufferUse(number, MEASUREMENTS, 0))
            _measure(graph, guard, row, stored, parts, measures)
        if outcome in COMPARING:
            row = _buffer(graph, len(uses))
            uses.append(BufferUse(number, DIFFERENCE, 0))
            lent: dict[int, list[fx.Node]] = {}
            for index, layout in enumerate(parts):
                lent[index] = []
                for part in range(layout.parts):
                    lent[index].append(_buffer(graph, len(uses)))
                    uses.append(BufferUse(number, LENT - index, part))
            _compare(graph, guard, row, lent, parts)
        for index, layout in enumerate(parts):
            fresh = cast(fx.Node, guard.args[1 + index])
            item = next((u for u in guard.users if u.target is operator.getitem and u.args[1] == index), None)
            buffers = stored[index]
            with graph.inserting_after(guard):
                anchor = graph.call_function(_here)
            with graph.inserting_before(anchor):
                if outcome is Outcome.REUSE:
                    value = _read(graph, buffers, layout, item not in attended and _written_later(item, graph))
                    if item is not None and layout.balance and layout.of_keys:
                        _fold(graph, item, buffers[2], layout)
                else:
                    value = fresh
                    if outcome in STORING:
                        parts_of = _quantised(graph, fresh, layout, _beside(layout, buffers, item))
                        for part, part_value in enumerate(parts_of):
                            if layout.late_size:
                                found[BufferUse(number, index, part)] = graph.call_method("clone", (part_value,))
                            else:
                                graph.call_method("copy_", (buffers[part], part_value))
            graph.erase_node(anchor)
            if item is not None:
                if value.op != "placeholder" and value is not fresh:
                    value.meta = dict(item.meta)  # and so its memory: a write through a view of it is a write into it
                    if item in attended:  # ... which nobody makes: with it, what fills the keys would stay
                        del value.meta["example_value"]
                item.replace_all_uses_with(value)
                graph.erase_node(item)
    for guard in guards:
        graph.erase_node(guard)
    for node in list(graph.nodes):
        if not reused.isdisjoint(node.meta.get(CHECKS, ())):
            graph.erase_node(node)
    result.args = ((*cast(tuple[fx.Node, ...], result.args[0]), *found.values()),)
    eliminate_dead_code(out)
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("in_")]
    used = tuple(i for i, n in enumerate(inputs) if n.users)
    for node in inputs:
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    out.recompile()
    return Variant(out, used, tuple(uses), kept, tuple(found))


def _measure(
    graph: fx.Graph,
    guard: fx.Node,
    row: fx.Node,
    stored: dict[int, list[fx.Node]],
    layouts: Sequence[ExitLayout],
    measures: frozenset[str],
) -> None:
    """Write into ``row`` what ``measures`` asks for; before anything is stored, as what is stored is read for it."""
    attentions = _attentions(graph, guard)
    settings = next((name.split(":")[1:] for name in measures if name.startswith("entropy")), None)
    parts: list[fx.Node] = []
    if settings and attentions:
        entropies = [put_entropy(graph, attention, *settings) for attention in attentions]
        with graph.inserting_after(entropies[-1]):
            parts.append(graph.call_function(entropy_of, (entropies,)))
    exits = [cast(fx.Node, guard.args[1 + i]) for i in range(len(layouts)) if stored[i]]
    if "change" in measures and exits:
        with graph.inserting_before(guard):
            parts.append(_change(graph, exits, stored, layouts, attentions))
    if not parts:
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_after(max(parts, key=order.__getitem__)):
        anchor = graph.call_function(_here)
    with graph.inserting_before(anchor):
        nothing = graph.call_function(torch.full_like, (parts[0], torch.nan)) if len(parts) == 1 else parts[0]
        has_entropy = parts[0].target is entropy_of
        halves = parts if len(parts) == 2 else [parts[0], nothing] if has_entropy else [nothing, parts[0]]
        graph.call_method("copy_", (row, graph.call_function(torch.cat, (halves,))))
    graph.erase_node(anchor)


def _compare(
    graph: fx.Graph, guard: fx.Node, row: fx.Node, lent: dict[int, list[fx.Node]], layouts: Sequence[ExitLayout]
) -> None:
    """Write into ``row`` how far the exits are from those that another branch has stored."""
    exits = [cast(fx.Node, guard.args[1 + i]) for i in range(len(layouts))]
    with graph.inserting_before(guard):
        graph.call_method("copy_", (row, _change(graph, exits, lent, layouts, _attentions(graph, guard))))


def _change(
    graph: fx.Graph,
    exits: Sequence[fx.Node],
    stored: dict[int, list[fx.Node]],
    layouts: Sequence[ExitLayout],
    attentions: Sequence[fx.Node],
) -> fx.Node:
    """Fresh ``exits`` against what is ``stored``."""
    before = [_read_back(graph, stored[i], layout) for i, layout in enumerate(layouts) if stored[i]]
    return graph.call_function(change_of, (exits, before, _share_batch(attentions, exits)))


def _attentions(graph: fx.Graph, guard: fx.Node) -> list[fx.Node]:
    return [n for n in graph.nodes if n.meta.get(ATTENTION) == guard_number(guard)]


def _share_batch(attentions: Sequence[fx.Node], exits: Sequence[fx.Node]) -> bool:
    """True if the first dimension of all exits is that of the attention's query: samples can be told apart."""
    query = attentions[0].args[0] if attentions and attentions[0].args else None
    if not isinstance(query, fx.Node):
        return False
    batch = query.meta["example_value"].shape[0]
    return all(node.meta["example_value"].shape[0] == batch for node in exits)


def _here() -> None:
    """Marks a place in the graph while nodes are put there; never stays."""


def _buffer(graph: fx.Graph, number: int) -> fx.Node:
    """A placeholder behind all others. Buffers carry no fake tensor: they share storage with nothing in the graph."""
    last = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
        return graph.placeholder(f"stored_{number}")


def _read(graph: fx.Graph, buffers: list[fx.Node], layout: ExitLayout, private: bool) -> fx.Node:
    """What a reuse step hands on: of balanced keys, what the queries of ``_fold`` go with."""
    if layout.granularity:

        def read(*parts: torch.Tensor) -> torch.Tensor:
            return layout.unpack(*parts, folded=layout.of_keys)

        return _traced(graph, read, buffers[:2] if layout.of_keys else buffers)[0]
    # Somebody writes into what they are handed: give them a copy, or they would write into the store.
    return graph.call_method("clone", (buffers[0],)) if private else buffers[0]


def _read_back(graph: fx.Graph, buffers: list[fx.Node], layout: ExitLayout) -> fx.Node:
    """What was stored, to be compared with what is computed now."""
    return _traced(graph, layout.unpack, buffers)[0] if layout.granularity else buffers[0]


def _fold(graph: fx.Graph, item: fx.Node, factors: fx.Node, layout: ExitLayout) -> None:
    """Undo the balancing of the keys ``item`` in the queries of the attention that reads them."""
    for attention in list(item.users):
        query = query_of(attention)
        assert query is not None  # keys of other operators are not balanced

        def fold(query: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
            return fold_into_query(query, factors, layout.groups)

        attend_with(attention, _traced(graph, fold, [query, factors])[0])


def _beside(layout: ExitLayout, buffers: list[fx.Node], item: fx.Node | None) -> list[fx.Node]:
    """What ``ExitLayout.pack`` is given beside the value."""
    if layout.balance == GIVEN:
        return [buffers[2]]
    if layout.balance and layout.of_keys:
        assert item is not None  # the attention behind the guard is in this piece, or the keys would not be balanced
        return [cast(fx.Node, query_of(next(iter(item.users))))]
    return []


def _quantised(graph: fx.Graph, fresh: fx.Node, layout: ExitLayout, beside: list[fx.Node]) -> list[fx.Node]:
    """What is stored of ``fresh``: itself, or values and scales."""
    return _traced(graph, layout.pack, [fresh, *beside]) if layout.granularity else [fresh]


def _traced(graph: fx.Graph, function: Callable[..., object], arguments: Sequence[fx.Node]) -> list[fx.Node]:
    """Trace ``function`` and copy its nodes to the insertion point; returns its result(s)."""
    traced = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(traced)
    mapping = {traced.placeholder(f"argument_{i}"): given for i, given in enumerate(arguments)}
    result = function(*(fx.Proxy(node, tracer) for node in mapping))
    results = cast(tuple[fx.Proxy, ...], result if isinstance(result, tuple) else (result,))
    traced.output(tuple(proxy.node for proxy in results))
    return list(cast(tuple[fx.Node, ...], graph.graph_copy(traced, mapping)))


def _written_later(item: fx.Node | None, graph: fx.Graph) -> bool:
    """True if something writes into the exit after it was handed out, or hands it to the caller of the model."""
    if item is None:
        return False
    memory = storages(item)
    family = {n for n in graph.nodes if storages(n) & memory} | {item}
    result = next(n for n in graph.nodes if n.op == "output")
    return any(w in family for n in graph.nodes for w in written(n)) or any(n in family for n in result.all_input_nodes)


def _only_attended(item: fx.Node) -> bool:
    """True if nothing but attentions reads an exit: they write into nothing, and hand on none of its memory."""
    return all(is_attention(user) and not written(user) for user in item.users)
