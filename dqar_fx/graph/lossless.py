"""What stays the same during a generation: it follows from parameters and from what the generation is conditioned on.

The keys and values of a cross-attention on the prompt are made of the prompt alone, as is all of an attention that
refines or pools its embedding: no latent and no timestep reaches them. Computed once, they are right to the last bit
for as long as those inputs are the same memory, which is seen at every call (``runtime.lossless``): what is said here
is only for which values that is worth looking at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import fx

from dqar_fx.graph.capture import attribute, is_parameter, source_name
from dqar_fx.graph.effects import (
    depending_on,
    has_late_size,
    inside_modes,
    must_keep,
    storages,
    target_name,
    written,
)
from dqar_fx.graph.guard import reuse_or_compute
from dqar_fx.graph.sites import Region

#: Picks, among the sources of a graph's inputs, those that stay the same during a generation.
Constant = Callable[[Sequence[str]], Collection[str]]
#: Parts of the names of operators whose results differ from call to call.
_RANDOM = ("rand", "bernoulli", "multinomial", "normal_", "poisson", "gumbel", "rrelu", "exponential_", "uniform_")


def invariant(gm: fx.GraphModule, constant: Constant) -> set[fx.Node]:
    """The nodes of a graph, inputs included, that stay the same during a generation.

    Sound whatever ``constant`` picks: everything that reaches them, through memory too, is a parameter, a size, or an
    input that it picked. State that the graph itself writes, and what is drawn at random, reaches none. Left out as
    well is what cannot be computed at another place in the graph: what stands between a change of mode (autocast) and
    its end, has a size that is found only when the graph runs, or calls a graph of its own (``flex_attention``).
    """
    nodes = list(gm.graph.nodes)
    picked = frozenset(constant([source_name(n) for n in nodes if n.op == "placeholder"]))
    outside = frozenset().union(*(storages(n) for n in nodes if n.op in ("placeholder", "get_attr")))
    rewritten = frozenset().union(*(storages(w) for n in nodes for w in written(n))) & outside
    modes = inside_modes(nodes)
    changing = [
        node
        for node in nodes
        if (_changes(gm, node) if node.op != "placeholder" else not _stays(node, picked))
        or node in modes
        or storages(node) & rewritten
        or has_late_size(node)
    ]
    return set(nodes) - depending_on(changing, set(nodes))


def mark_lossless(gm: fx.GraphModule, regions: Sequence[Region], constant: Constant) -> list[Region]:
    """The regions, those marked (``Site.lossless``) all of whose exits are ``invariant``."""
    stays = {node.name for node in invariant(gm, constant)}
    return [
        replace(region, site=replace(region.site, lossless=True))
        if region.exits and not region.site.reason and stays.issuperset(region.exits)
        else region
        for region in regions
    ]


def _changes(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True for a call whose result is not settled by its arguments, or that has to stay where it is."""
    if node.op == "get_attr":
        return isinstance(attribute(gm, str(node.target)), torch.nn.Module)
    return must_keep(node) or node.target is reuse_or_compute or any(part in target_name(node) for part in _RANDOM)


def _stays(placeholder: fx.Node, constant: Collection[str]) -> bool:
    """True for a parameter, for a size (what is kept is kept apart by these), and for a ``constant`` input."""
    if getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False):
        return False  # a number that the caller gives; it may be the timestep
    value = placeholder.meta.get("example_value")
    size = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return is_parameter(placeholder) or size or source_name(placeholder) in constant
