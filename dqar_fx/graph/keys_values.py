"""Sites at which keys and values are stored in place of what leaves the attention (``CacheConfig(target="kv")``).

What is stored is what the attention operator is given as ``key`` and ``value``: after projections, norms and rotary
embedding, for joint attention of both streams together. Queries stay fresh. When the stored ones are read, the
projections of keys and values, and what only they needed, are dead; queries, attention and out-projection stay. Every
operator is a site of its own here, also where a module holds several: their keys and values are ready at different
times.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import replace

import torch
from torch import fx

from dqar_fx.graph.attentions import heads_before_tokens, keys_and_values, roles
from dqar_fx.graph.effects import asserts, storages, target_name, written
from dqar_fx.graph.owners import is_size, parameter_only
from dqar_fx.graph.sites import Region, find_sites


def find_stored(gm: fx.GraphModule, target: str) -> list[Region]:
    """The sites of a Dynamo graph, for what is to be stored: ``"output"`` (as ``find_sites``) or ``"kv"``."""
    regions = find_sites(gm)
    if target == "kv":
        regions = _keys_and_values(gm, regions)
    seen: Counter[str] = Counter()
    named = []
    for region in regions:
        path, number = region.site.path, seen[region.site.path]
        seen[path] += 1
        named.append(replace(region, key=f"{path}#{number + 1}" if number else path))
    return named


def _keys_and_values(gm: fx.GraphModule, regions: list[Region]) -> list[Region]:
    """One region per attention operator, whose exits are its keys and values; what cannot be so has its reason."""
    nodes = list(gm.graph.nodes)
    by_name = {node.name: node for node in nodes}
    order = {node: position for position, node in enumerate(nodes)}
    parameters = parameter_only(nodes)
    # What costs nothing to have again: parameters, what is made of them, and views of what the graph is given.
    given = frozenset().union(*(storages(n) for n in nodes if n.op == "placeholder"))
    found: list[Region] = []
    for region in regions:
        site = replace(region.site, exits=(), shapes=())
        operators = [by_name[name] for name in region.attentions if keys_and_values(by_name[name])]
        unused = bool(site.reason) and not region.site.exits  # for the same reason there is nothing to store here
        if unused or not operators:
            reason = site.reason if unused else _no_operator(by_name, region)
            found.append(replace(region, site=replace(site, reason=reason), exits=(), sizes=()))
            continue
        for node in operators:
            key, value = keys_and_values(node) or (node, node)
            free = {n for n in (key, value) if n in parameters or storages(n) & given}
            exits = [n for n in dict.fromkeys((key, value)) if n not in free]
            parts = ["both" if key is value else "key" if n is key else "value" for n in exits]
            reason = _refusal(node, exits)
            taking_part = roles([node], set())
            own = replace(
                site,
                exits=tuple(n.name for n in exits),
                shapes=tuple(tuple(n.meta["example_value"].shape) for n in exits if not reason),
                heads=taking_part.heads,
                reason=reason,
            )
            found.append(
                Region(
                    own,
                    (node.name,),
                    own.exits,
                    frozenset(n.name for n in _only_for(exits, node, taking_part.query, order)),
                    taking_part.batch if heads_before_tokens(node) else None,
                    roles=tuple(parts),
                )
            )
    return found


def _no_operator(by_name: dict[str, fx.Node], region: Region) -> str:
    name = target_name(by_name[region.attentions[0]])
    if "multi_head_attention" in name:
        return f"its keys and values are made inside of one operator ({name}); only its output can be stored"
    return "it is written out in products or packed, so no operator takes its keys and values; store its output"


def _refusal(node: fx.Node, exits: list[fx.Node]) -> str:
    """Why the keys and values of an operator cannot be stored, or ""."""
    if not exits:
        return "its keys and values are inputs or parameters as they stand: reading them back would save nothing"
    for exit_node in exits:
        value = exit_node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2:
            return f"{exit_node.name} is no floating-point tensor of at least 2 dimensions"
    if written(node):
        return f"{node.name} writes in place into what it is given"
    return ""


def _only_for(
    exits: list[fx.Node], attention: fx.Node, query: fx.Node | None, order: dict[fx.Node, int]
) -> set[fx.Node]:
    """What only the ``exits`` of ``attention`` need: no node outside reads it, except for sizes and checks of them."""
    inside: set[fx.Node] = set()
    visited = set(exits)
    pending = [(-order[node], node.name, node) for node in exits]
    heapq.heapify(pending)
    while pending:  # from the last to the first, so that whoever reads a node was judged before it
        node = heapq.heappop(pending)[-1]
        readers = [u for u in node.users if not is_size(u) and not asserts(u)]
        outside = any(u is not attention and u not in inside for u in readers)
        if node.op == "placeholder" or node is query or outside:
            continue
        inside.add(node)
        for argument in node.all_input_nodes:
            if argument not in visited:
                visited.add(argument)
                heapq.heappush(pending, (-order[argument], argument.name, argument))
    return inside
