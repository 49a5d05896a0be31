"""Put one guarded *read the cache or compute* node at each attention. This is the graph that ``diff`` shows."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import fx

from dqar_fx.graph.attentions import attend_over, keys_and_values
from dqar_fx.graph.capture import fork, readable
from dqar_fx.graph.effects import asserts, storages, writers
from dqar_fx.graph.measure import can_tell_entropy
from dqar_fx.graph.owners import is_size
from dqar_fx.graph.sites import Region

#: In the ``meta`` of an assertion: the sites that it needs computed.
CHECKS = "dqar_checks"
#: In the ``meta`` of a ``scaled_dot_product_attention``: the number of the guard behind it.
ATTENTION = "dqar_attention"


def reuse_or_compute(site: int, *exits: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: ARG001  # for the reader
    """The guard. As a function it computes: it hands on the fresh ``exits``. ``specialise`` puts in other outcomes."""
    return exits


def guard_sites(gm: fx.GraphModule, regions: Sequence[Region]) -> fx.GraphModule:
    """Route every exit of each region through one ``reuse_or_compute`` node; sites count from 0 in the order given.

    Before::  image, text = attn(x, e);  y = x + gate * image;  e2 = e + text
    After::   image, text = attn(x, e)
              guard = reuse_or_compute(3, image, text)
              y = x + gate * guard[0];  e2 = e + guard[1]

    Of a region whose exits are keys and values, only the attention reads what the guard hands on:

    Before::  y = attend(q, k, v)
    After::   guard = reuse_or_compute(3, k, v);  y = attend(q, guard[0], guard[1])

    Numerics, shapes and dtypes are unchanged. Refused regions (those with a reason) must have been left out. Applied to
    its own result it has nothing to do: the regions of a guarded graph read ``reuse_or_compute`` already.
    """
    out = fork(gm)
    nodes = {node.name: node for node in out.graph.nodes}
    position = {node: i for i, node in enumerate(out.graph.nodes)}
    for site, region in enumerate(regions):
        for name in region.attentions:
            if can_tell_entropy(nodes[name]):
                nodes[name].meta[ATTENTION] = site
        exits = [nodes[name] for name in region.exits]
        if region.roles:
            _guard_arguments(out.graph, site, region, nodes)
            continue
        if any(user.target is reuse_or_compute for node in exits for user in node.users):
            continue
        inside = {nodes[name] for name in region.inside}
        # An attention may still write into what it hands out (`a = proj(x); a.add_(bias)`): wait for that.
        memory = frozenset().union(*map(storages, exits))
        with out.graph.inserting_after(max((*exits, *writers(inside, memory)), key=position.__getitem__)):
            guard = out.graph.call_function(reuse_or_compute, (site, *exits))
        guard.meta = {k: v for k, v in exits[-1].meta.items() if k != "example_value"}
        guard.meta["example_value"] = tuple(n.meta.get("example_value") for n in exits)
        after = guard
        handed_on: dict[fx.Node, fx.Node] = {}
        for index, node in enumerate(exits):
            with out.graph.inserting_after(after):
                item = out.graph.call_function(operator.getitem, (guard, index))
            item.meta = dict(node.meta)
            for user in [u for u in node.users if u not in inside and u is not guard]:
                user.replace_input_with(node, item)
            handed_on[node] = after = item
        for name in region.sizes:  # numbers that follow from the sizes of the exits: from what the guard hands on
            node = nodes[name]
            with out.graph.inserting_after(after):
                number = out.graph.node_copy(node, lambda n: handed_on.get(n, n))  # noqa: B023  # called here
            number.meta = dict(node.meta)
            for user in [u for u in node.users if u not in inside]:
                user.replace_input_with(node, number)
            handed_on[node] = after = number
        for node in inside_checks(inside):
            node.meta[CHECKS] = (*node.meta.get(CHECKS, ()), site)
    out.graph.lint()
    out.recompile()
    return out


def _guard_arguments(graph: fx.Graph, site: int, region: Region, nodes: dict[str, fx.Node]) -> None:
    """Guard what one attention is given as keys and values, right before it: all writes into them have happened."""
    attention = nodes[region.attentions[0]]
    present = keys_and_values(attention)
    assert present is not None  # the region would have been refused
    if any(n.target is operator.getitem and n.all_input_nodes[0].target is reuse_or_compute for n in present):
        return
    exits = [nodes[name] for name in region.exits]
    handed_on = dict(zip(("key", "value"), present, strict=True))
    with graph.inserting_before(attention):
        guard = graph.call_function(reuse_or_compute, (site, *exits))
        guard.meta = {k: v for k, v in attention.meta.items() if k == "nn_module_stack"}
        guard.meta["example_value"] = tuple(n.meta.get("example_value") for n in exits)
        for index, (node, role) in enumerate(zip(exits, region.roles, strict=True)):
            item = graph.call_function(operator.getitem, (guard, index))
            item.meta = {**node.meta, "nn_module_stack": attention.meta.get("nn_module_stack", {})}
            handed_on |= dict.fromkeys(("key", "value") if role == "both" else (role,), item)
    attend_over(attention, handed_on["key"], handed_on["value"])
    for node in inside_checks({nodes[name] for name in region.inside}):
        node.meta[CHECKS] = (*node.meta.get(CHECKS, ()), site)


def unguard(gm: fx.GraphModule, sites: Collection[int]) -> fx.GraphModule:
    """Take the guards of ``sites`` out again: what they hand on is what they were given. ``gm`` is left as it was."""
    out = fork(gm)
    for guard in guard_nodes(out.graph):
        if guard_number(guard) in sites:
            for item in list(guard.users):
                item.replace_all_uses_with(cast(fx.Node, guard.args[1 + cast(int, item.args[1])]))
                out.graph.erase_node(item)
            out.graph.erase_node(guard)
    out.graph.lint()
    out.recompile()
    return out


def inside_checks(inside: set[fx.Node]) -> set[fx.Node]:
    """The assertions that can only be made if the attention was computed: about sizes of what is in it."""
    found: set[fx.Node] = set()
    pending = [user for node in inside for user in node.users]
    while pending:
        node = pending.pop()
        if asserts(node):
            found.add(node)
        elif is_size(node) and node not in found:
            found.add(node)
            pending.extend(node.users)
    return {node for node in found if asserts(node)}


def guard_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The guard nodes of a graph, in order."""
    return [node for node in graph.nodes if node.target is reuse_or_compute]


def guard_number(guard: fx.Node) -> int:
    """The number of a guard: its site's in a whole graph, counted from 0 in a piece."""
    return cast(int, guard.args[0])


def graph_diff(before: fx.GraphModule, after: fx.GraphModule, name: str = "graph") -> str:
    """The two graphs as a unified diff, one node a line."""
    texts = readable(before).splitlines(), readable(after).splitlines()
    return "\n".join(difflib.unified_diff(*texts, f"{name}: captured", f"{name}: guarded", lineterm="", n=2))
