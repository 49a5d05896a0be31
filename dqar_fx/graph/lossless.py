"""Sites whose stored value stays exact: it follows from parameters and from what a generation is conditioned on.

The keys and values of a cross-attention on the prompt are made of the prompt alone, as is all of an attention that
refines or pools its embedding: no latent and no timestep reaches them. Computed once, they are right to the last bit
for as long as those inputs are the same memory, which is seen at every call (``runtime.lossless``): what is said here
is only for which sites that is worth looking at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import fx

from dqar_fx.graph.capture import is_parameter, source_name
from dqar_fx.graph.effects import depending_on, storages, target_name, written
from dqar_fx.graph.sites import Region

#: Parts of the names of operators whose results differ from call to call.
_RANDOM = ("rand", "bernoulli", "multinomial", "normal_", "poisson", "gumbel", "rrelu", "exponential_", "uniform_")


def mark_lossless(
    gm: fx.GraphModule, regions: Sequence[Region], constant: Callable[[Sequence[str]], Collection[str]]
) -> list[Region]:
    """The regions, those marked (``Site.lossless``, ``Region.inputs``) that depend on ``constant`` inputs only.

    ``constant`` picks, among the sources of the graph's inputs, those that stay the same during a generation. Sound
    whatever it picks: everything that reaches an exit, through memory too, is a parameter, a size, or listed in
    ``inputs``. State that the graph itself writes, and what is drawn at random, reaches none. Expects the graph as
    Dynamo captured it; a site is marked only if all of its exits are so.
    """
    picked = frozenset(constant([source_name(n) for n in gm.graph.nodes if n.op == "placeholder"]))
    nodes = list(gm.graph.nodes)
    everything = set(nodes)
    outside = frozenset().union(*(storages(n) for n in nodes if n.op in ("placeholder", "get_attr")))
    rewritten = frozenset().union(*(storages(w) for n in nodes for w in written(n))) & outside
    changing = [
        node
        for node in nodes
        if (node.op == "placeholder" and not _stays(node, picked))
        or storages(node) & rewritten
        or (node.op != "placeholder" and any(part in target_name(node) for part in _RANDOM))
    ]
    after = depending_on(changing, everything)
    exits = [{node for node in nodes if node.name in region.exits} for region in regions]
    if all(own & after for own in exits):
        return list(regions)  # as nearly always where outputs are stored
    given = [n for n in nodes if n.op == "placeholder" and source_name(n) in picked]
    reached = {node.name: depending_on([node], everything) for node in given}
    marked = []
    for region, own in zip(regions, exits, strict=True):
        if region.site.reason or not own or own & after:
            marked.append(region)
        else:
            inputs = tuple(name for name, nodes_of in reached.items() if own & nodes_of)
            marked.append(replace(region, site=replace(region.site, lossless=True), inputs=inputs))
    return marked


def _stays(placeholder: fx.Node, constant: Collection[str]) -> bool:
    """True for a parameter, for a size (stored values are kept apart by these), and for a ``constant`` input."""
    value = placeholder.meta.get("example_value")
    size = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return is_parameter(placeholder) or size or source_name(placeholder) in constant
