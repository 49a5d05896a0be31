"""Cut a guarded graph between its repeated blocks, and recognise equal blocks.

Compiling 28 equal blocks then costs what compiling one costs, and a step may take another outcome in each block without
another compilation of the whole model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

from dqar_fx.graph.attentions import is_attention, is_product
from dqar_fx.graph.capture import attribute, is_parameter, module_stack
from dqar_fx.graph.cuts import sink
from dqar_fx.graph.effects import changes_mode, finds_size, mode_spans, storage_list, storages, written
from dqar_fx.graph.guard import ATTENTION, CHECKS, guard_nodes, guard_number, reuse_or_compute
from dqar_fx.graph.hoist import Hoisted
from dqar_fx.graph.sites import Region


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of the graph between two cuts.

    Attributes:
        gm: inputs -> tuple of outputs; its guards are numbered from 0 within the piece.
        key: equal for pieces that compute the same function of their inputs.
        inputs: names, in the whole graph, of the values it reads.
        outputs: names, in the whole graph, of the values that later pieces or the model's result read.
        sites: the global site number of each local guard.
        checked: the global numbers of the sites that its assertions need computed (in ``CHECKS`` counted from 0).
        label: the block it stands for, for people.
        hoisted: it is of the part that stays the same during a generation (see ``hoist``).
    """

    gm: fx.GraphModule
    key: Hashable
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sites: tuple[int, ...]
    label: str
    checked: tuple[int, ...] = ()
    hoisted: bool = False


def partition(
    gm: fx.GraphModule, regions: Sequence[Region], *, fuse: bool = False, hoisted: Hoisted | None = None
) -> list[Piece]:
    """Split the guarded graph into pieces that run one after the other; ``gm`` is left as it was.

    Before::  y = x; for block in blocks: y = block(y, c);  return norm(y)
    After::   [prologue] [blocks.0] [blocks.1] ... [epilogue]

    Sound because a cut never reorders anything: each piece is a run of consecutive nodes. A value that is written in
    place stays in one piece with all that share its storage, and so does whatever stands between a change of mode
    (autocast) and its end. A call that finds a size from values is a piece of its own: what follows is compiled for the
    size that was found. With ``fuse`` the elementwise tail of a piece moves into the next one (see ``sink``).
    What is ``hoisted`` has pieces of its own, before all others.
    """
    first = hoisted.first if hoisted is not None else frozenset[fx.Node]()
    everything = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    nodes = [n for n in everything if n not in first]
    labels = block_labels(everything, regions, hoisted.moved if hoisted is not None else {})
    runs = _runs(nodes, labels, regions)
    runs = _merge(runs, nodes)
    if fuse:
        runs = sink(runs)
    if first:
        before = [n for n in everything if n in first]
        runs = _merge(_blocks(before, labels), before) + runs
    result = next(n for n in gm.graph.nodes if n.op == "output")
    returned = set(result.all_input_nodes)
    pieces = []
    for label, run in runs:
        members = set(run)
        outputs = [n for n in run if n in returned or any(u not in members and u is not result for u in n.users)]
        pieces.append(extract(gm, label, run, outputs, hoisted=run[0] in first))
    return pieces


def whole(gm: fx.GraphModule) -> Piece:
    """The guarded graph as a single piece; what it hands back are the values, each once, that ``gm`` does."""
    result = next(n for n in gm.graph.nodes if n.op == "output")
    run = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    return extract(gm, "model", run, [n for n in dict.fromkeys(result.all_input_nodes) if n.op != "placeholder"])


def block_labels(
    nodes: Sequence[fx.Node], regions: Sequence[Region], moved: Mapping[str, str] = MappingProxyType({})
) -> dict[fx.Node, str]:
    """The block that each node belongs to: the innermost list element that holds a whole attention; "" for none.

    ``moved``: names that nodes of the regions have now.
    """
    by_name = {n.name: n for n in nodes}
    blocks: set[str] = set()
    for region in regions:
        attention = region.attentions[0]
        stack = [call.path for call in module_stack(by_name[moved.get(attention, attention)])]
        elements = [path for path in stack if path.rpartition(".")[2].isdecimal()]
        # An element of a list *inside* the attention (`to_out.0`) is no block; one that only is the attention is a
        # block if there is nothing larger.
        around = [p for p in elements if region.site.path.startswith(p + ".")] if region.site.owner else elements
        if around or elements:
            blocks.add((around or elements)[-1])
    labels = {
        node: next((call.path for call in reversed(module_stack(node)) if call.path in blocks), "") for node in nodes
    }
    # Dynamo notes no module on a change of mode: what opens one belongs to what follows and what closes it to what
    # comes before, or it would tie two blocks together.
    spans = mode_spans(nodes)
    for changes, run in (({start for start, _ in spans}, nodes[::-1]), ({end for _, end in spans if end}, nodes)):
        beside = ""
        for node in run:
            if node in changes or (not changes_mode(node) and not changes.isdisjoint(node.users)):
                labels[node] = beside
            beside = labels[node]
    return labels


def _blocks(nodes: list[fx.Node], labels: dict[fx.Node, str]) -> list[tuple[str, list[fx.Node]]]:
    """Consecutive nodes of one block; what belongs to none joins the block before."""
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in nodes:
        label = labels[node] or (runs[-1][0] if runs else "prologue")
        if not runs or runs[-1][0] != label:
            runs.append((label, []))
        runs[-1][1].append(node)
    return runs


def _runs(
    nodes: list[fx.Node], labels: dict[fx.Node, str], regions: Sequence[Region]
) -> list[tuple[str, list[fx.Node]]]:
    """Consecutive nodes of one block. What stands between two blocks joins the first; the end is a run of its own.

    Within a block, what finds sizes from values stands apart.
    """
    apart = _finding(nodes)
    runs: list[tuple[str, list[fx.Node]]] = []
    attentions = {region.attentions[0] for region in regions}
    with_guard = max(
        (i for i, n in enumerate(nodes) if n.target is reuse_or_compute),
        # All guards may have gone with what was hoisted; the attentions themselves read a latent.
        default=max((i for i, n in enumerate(nodes) if n.name in attentions), default=-1),
    )
    last_block = labels[nodes[with_guard]] if with_guard >= 0 else ""
    finished = finding = False
    for position, node in enumerate(nodes):
        label = labels[node]
        if position > with_guard and (finished or label != last_block):
            # After the last block with an attention everything is epilogue, even if it calls an earlier block's module
            # again (a DiT's final layer uses block 0's conditioning).
            finished, label = True, "epilogue"
        elif not label:
            label = runs[-1][0] if runs else "prologue"
        if not runs or runs[-1][0] != label or (node in apart) != finding:
            runs.append((label, []))
            finding = node in apart
        runs[-1][1].append(node)
    return runs


def _finding(nodes: list[fx.Node]) -> set[fx.Node]:
    """What finds a size, and what stands between two of that kind if it is nothing that is worth compiling."""
    found: set[fx.Node] = set()
    between: list[fx.Node] | None = None
    for node in nodes:
        if finds_size(node):
            found.update(between or (), (node,))
            between = []
        elif between is not None:
            works = node.target is reuse_or_compute or is_attention(node) or is_product(node)
            between = None if works or any(map(is_parameter, node.all_input_nodes)) else [*between, node]
    return found


def _merge(runs: list[tuple[str, list[fx.Node]]], nodes: list[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Join runs over which storage that is written in place, a change of mode, or a value that is no tensor extends."""
    index = {node: i for i, (_, run) in enumerate(runs) for node in run}
    spans = [(index[start], index[end] if end else len(runs) - 1) for start, end in mode_spans(nodes)]
    stored = {node: storages(node) for node in nodes}
    for node in nodes:
        for target in written(node):
            touched = stored[target] if target in stored else storages(target)
            family = [n for n in nodes if stored[n] & touched or n is target]
            readers = [u for n in family for u in n.users if u in index]
            around = [index[n] for n in (*family, *readers, node)]
            spans.append((min(around), max(around)))
        if not _can_cross(node):
            around = [index[node], *(index[u] for u in node.users if u in index)]
            spans.append((min(around), max(around)))
    joined = [False] * len(runs)  # joined[i]: run i belongs to the one before it
    for first, last in spans:
        for i in range(first + 1, last + 1):
            joined[i] = True
    merged: list[tuple[str, list[fx.Node]]] = []
    for i, (label, run) in enumerate(runs):
        if joined[i]:
            merged[-1] = (merged[-1][0], merged[-1][1] + run)
        else:
            merged.append((label, run))
    return merged


def _can_cross(node: fx.Node) -> bool:
    """True if the value of ``node`` may be an output of a piece: a tensor or a number."""
    value = node.meta.get("example_value")
    return isinstance(value, (torch.Tensor, int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def extract(
    gm: fx.GraphModule, label: str, run: Sequence[fx.Node], outputs: Sequence[fx.Node], *, hoisted: bool = False
) -> Piece:
    """The nodes ``run``, in order, as a piece that hands back ``outputs``; ``gm`` is left as it was."""
    members = set(run)
    inputs: list[fx.Node] = []
    for node in run:
        for argument in node.all_input_nodes:
            if argument not in members and argument not in inputs:
                inputs.append(argument)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        mapping[node] = graph.placeholder(f"in_{i}")
        mapping[node].meta = dict(node.meta)
    sites: list[int] = []
    checked: dict[int, int] = {}
    for node in run:
        copy = mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        copy.meta = dict(node.meta)
        if node.target is reuse_or_compute:
            copy.args = (len(sites), *copy.args[1:])
            sites.append(guard_number(node))
        if CHECKS in node.meta:
            copy.meta[CHECKS] = tuple(checked.setdefault(site, len(checked)) for site in node.meta[CHECKS])
    for copy in graph.nodes:
        if copy.meta.get(ATTENTION) in sites:
            copy.meta[ATTENTION] = sites.index(copy.meta[ATTENTION])
        else:
            copy.meta.pop(ATTENTION, None)
    graph.output(tuple(mapping[n] for n in outputs))
    taken = fx.GraphModule(gm, graph)
    return Piece(
        taken,
        structure(taken),
        tuple(n.name for n in inputs),
        tuple(n.name for n in outputs),
        tuple(sites),
        label,
        tuple(checked),
        hoisted,
    )


def structure(gm: fx.GraphModule) -> Hashable:
    """A hashable picture of the graph: operators, constants, wiring and shared memory, without names and shapes."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}

    # What shares memory does not follow from the operators: `contiguous` and `reshape` copy only if strides ask for it.
    # Which of the inputs it is makes no difference: a write into any of them is kept.
    given = {s for n in gm.graph.nodes if n.op == "placeholder" for s in storages(n)}
    made: dict[int, int] = {}
    lines: list[Hashable] = []
    for node in gm.graph.nodes:
        target: Hashable = node.target if node.op in ("call_function", "call_method") else ""
        if node.op == "get_attr":
            value = attribute(gm, str(node.target))  # the body of a higher-order operator, or something of the model's
            target = structure(value) if isinstance(value, fx.GraphModule) else ("attribute", id(value))
        arguments = freeze(node.args, number) if node.op != "placeholder" else ()
        memory = tuple(-1 if s in given else made.setdefault(s, len(made)) for s in storage_list(node))
        marks = (node.meta.get(CHECKS), node.meta.get(ATTENTION))
        lines.append((node.op, target, arguments, freeze(node.kwargs, number), memory, marks))
    return tuple(lines)


def freeze(value: object, number: Mapping[fx.Node, int]) -> Hashable:
    """An argument as something hashable; equal for equal arguments, nodes standing for their ``number``."""
    if isinstance(value, fx.Node):
        return ("node", number[value])
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(freeze(v, number) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, freeze(v, number)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", *(freeze(v, number) for v in (value.start, value.stop, value.step)))
    # 1, 1.0 and True are equal and hash alike, but are not the same argument; -0.0 and 0.0 differ too.
    return (type(value).__name__, repr(value) if isinstance(value, float) else _hashable(value))


def _hashable(value: object) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return ("unhashable", id(value))
    return value


def count_guards(pieces: Sequence[Piece]) -> int:
    """How many guards the pieces hold together: a cut must lose none."""
    return sum(len(guard_nodes(piece.gm.graph)) for piece in pieces)
