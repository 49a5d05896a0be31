"""The guarded graph as one program: each guard is a ``torch.cond`` between reading and computing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from dqar_fx.errors import ExportError
from dqar_fx.exporting.source import Source
from dqar_fx.exporting.steps import Stored, without_metadata
from dqar_fx.graph.capture import fork
from dqar_fx.graph.effects import eliminate_dead_code, live_nodes, storages, written
from dqar_fx.graph.guard import guard_nodes, guard_number, reuse_or_compute
from dqar_fx.graph.partition import Piece, extract
from dqar_fx.graph.specialise import BufferUse, Outcome, specialise


class Conditional(nn.Module):
    """All steps in one: ``(inputs, stored, reuse) -> (outputs, stored)``; ``reuse`` is bool ``[S]``, a row of the plan.

    A site that reuses reads what is stored and hands it on; one that computes stores. Nothing is written in place:
    what is returned as ``stored`` belongs to the next step. The weights are the module's own.
    """

    def __init__(self, source: Source, stored: Sequence[Stored]) -> None:
        super().__init__()
        for i, (_, weight) in enumerate(source.weights.values()):
            self.register_buffer(f"weight_{i}", weight)
        self._gm, self._inputs = _conditional(source, stored)
        inputs, weights = list(source.inputs), list(source.weights)
        self._given = [
            ("input", inputs.index(name)) if name in source.inputs else ("weight", weights.index(name))
            for name in self._inputs
        ]
        self._returned = [output.position for output in source.outputs]

    def forward(self, inputs: list[Tensor], stored: list[Tensor], reuse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One step."""
        given = [inputs[i] if kind == "input" else getattr(self, f"weight_{i}") for kind, i in self._given]
        results, kept = self._gm(*given, *stored, reuse)
        return [results[i] for i in self._returned], list(kept)


def _conditional(source: Source, stored: Sequence[Stored]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The guarded graph with a ``cond`` for each guard of a site that is stored; behind its inputs, what is stored and
    the row of the plan. Also the names of those inputs.

    Before::  a = attn(norm(x));  g = reuse_or_compute(0, a);  y = x + g[0]
    After::   c = cond(reuse[0], read, compute, (x, ..., q, s));  y = x + c[0];  and q, s of the next step: c[1], c[2]

    ``compute`` holds all that only this attention needs, so that reading saves it.
    """
    piece = source.piece
    out = fork(piece.gm)
    graph = out.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    places: dict[BufferUse, fx.Node] = {}
    with graph.inserting_after(last):
        row = graph.placeholder("reuse")
        for each in reversed(stored):
            with graph.inserting_after(last):
                places[each.use] = graph.placeholder(f"held_{each.use.guard}_{each.use.exit}_{each.use.part}")
    current = dict(places)
    for guard in guard_nodes(graph):
        site = piece.sites[guard_number(guard)]
        mine = [each.use for each in stored if each.use.guard == site]
        items = {user.args[1]: user for user in guard.users if user.target is operator.getitem}
        if not mine:
            for index, item in items.items():
                item.replace_all_uses_with(cast(fx.Node, guard.args[1 + cast(int, index)]))
            continue
        region = _only_for(guard, list(items.values()), out)
        _refuse_writes(graph, region, guard, source, site)
        taken = extract(out, "", [*region, guard, *items.values()], list(items.values()))
        read, compute = _branch(taken, Outcome.REUSE, source, site), _branch(taken, Outcome.STORE, source, site)
        out.add_submodule(f"read_{site}", read)
        out.add_submodule(f"compute_{site}", compute)
        outside = {n.name: n for n in graph.nodes}
        with graph.inserting_before(guard):
            operands = (*(outside[name] for name in taken.inputs), *(places[use] for use in mine))
            branches = (graph.get_attr(f"read_{site}"), graph.get_attr(f"compute_{site}"))
            reuse = graph.call_function(operator.getitem, (row, site))
            chosen = graph.call_function(torch.ops.higher_order.cond, (reuse, *branches, operands))
            for i, item in enumerate(items.values()):
                value = graph.call_function(operator.getitem, (chosen, i))
                value.meta = dict(item.meta)
                item.replace_all_uses_with(value)
            for i, use in enumerate(mine, len(items)):
                current[use] = graph.call_function(operator.getitem, (chosen, i))
    result = next(n for n in graph.nodes if n.op == "output")
    # What no guard hands on (given factors) is handed back as a copy, as torch wants no output that is an input.
    with graph.inserting_before(result):
        kept = [n if n.op != "placeholder" else graph.call_method("clone", (n,)) for n in current.values()]
    ordered = dict(zip(current, kept, strict=True))
    result.args = ((result.args[0], tuple(ordered[each.use] for each in stored)),)
    eliminate_dead_code(out)
    out.recompile()
    return without_metadata(out), piece.inputs


def _only_for(guard: fx.Node, items: Sequence[fx.Node], gm: fx.GraphModule) -> list[fx.Node]:
    """What is dead once ``items``, which ``guard`` hands on, come from elsewhere: in order.

    A branch is given tensors, and no guard belongs into another's branch: what would need either stays outside.
    """
    alive = {node.name for node in live_nodes(gm.graph)}
    outside: set[str] = set()
    while True:
        cut = fork(gm).graph
        nodes = {node.name: node for node in cut.nodes}
        result = next(n for n in cut.nodes if n.op == "output")
        for item in items:
            with cut.inserting_before(next(iter(cut.nodes))):
                read = cut.placeholder(f"read_{item.name}")
            read.meta = dict(item.meta)  # and so its memory: what is written into it later stays
            nodes[item.name].replace_all_uses_with(read)
        result.args = ((*result.args, *(nodes[name] for name in outside)),)
        kept = {node.name for node in live_nodes(cut)}
        dead = alive - kept - {guard.name, *(item.name for item in items)}
        region = [n for n in gm.graph.nodes if n.name in dead and n.op in ("call_function", "call_method")]
        inside = set(region)
        stays = {
            n.name for n in region if _chooses(n) or any(_is_tuple(i) for i in n.all_input_nodes if i not in inside)
        }
        if not stays:
            return region
        outside |= stays


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))


def _chooses(node: fx.Node) -> bool:
    """True for a guard, as it is or as a ``cond``, and for what it hands on."""
    made = node.all_input_nodes[0] if node.target is operator.getitem else node
    return made.target in (reuse_or_compute, torch.ops.higher_order.cond)


def _refuse_writes(graph: fx.Graph, region: Sequence[fx.Node], guard: fx.Node, source: Source, site: int) -> None:
    """What is moved to the guard must not read what something between them writes into."""
    if not region:
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    read = frozenset().union(*(storages(n) for node in region for n in (node, *node.all_input_nodes)))
    between = [n for n in graph.nodes if order[region[0]] < order[n] < order[guard] and n not in region]
    for node in between:
        if any(storages(target) & read for target in written(node)):
            raise ExportError(
                f"{source.sites[site].path or f'site {site}'} of {source.model}: {node.name} writes in place into what "
                f"the attention reads, so that it cannot become a branch. Export it as form='steps'."
            )


def _branch(taken: Piece, outcome: Outcome, source: Source, site: int) -> fx.GraphModule:
    """One branch of a guard: ``(what the attention needs, what is stored) -> (exits, what is stored from now on)``."""
    layouts = source.layouts[site]
    variant = specialise(taken.gm, [outcome], [layouts], range(len(taken.outputs)))
    graph = fx.Graph()
    given = [graph.placeholder(f"in_{i}") for i in range(len(taken.inputs))]
    held = {
        BufferUse(0, index, part): graph.placeholder(f"held_{index}_{part}")
        for index, layout in enumerate(layouts)
        for part in range(layout.parts)
    }
    names = [n for n in variant.gm.graph.nodes if n.op == "placeholder"]
    mapping = dict(zip(names, [*(given[i] for i in variant.inputs), *(held[u] for u in variant.buffers)], strict=True))
    stored = dict(held)
    buffers = {node: use for use, node in held.items()}
    for node in variant.gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            exits = [mapping[value] for value in node.args[0]]
        elif node.target == "copy_" and mapping[node.args[0]] in buffers:
            stored[buffers[mapping[node.args[0]]]] = mapping[node.args[1]]
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    # A branch may hand back nothing that is an input or shares memory with another result.
    copies = [graph.call_method("clone", (value,)) for value in (*exits, *stored.values())]
    graph.output(tuple(copies))
    return without_metadata(fx.GraphModule(variant.gm, graph))
