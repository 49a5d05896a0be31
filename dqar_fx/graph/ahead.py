"""What a guarded graph need not compute at every step, found in it before it is cut into pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from dqar_fx.graph.capture import source_name
from dqar_fx.graph.hoist import Hoisted, hoist, number
from dqar_fx.graph.lossless import Constant
from dqar_fx.graph.partition import block_labels
from dqar_fx.graph.sites import Region
from dqar_fx.graph.timestep_values import TimestepValues, take_out


def computed_once(
    gm: fx.GraphModule, regions: Sequence[Region], constant: Constant, exits: Sequence[Sequence[torch.Tensor]]
) -> Hoisted | None:
    """What stays the same during a generation, taken out of the blocks of ``gm``; None where nothing pays."""
    largest = max((math.prod(map(number, t.shape)) * t.element_size() for own in exits for t in own), default=0)
    sites = [i for i, region in enumerate(regions) if region.site.lossless]
    return hoist(gm, constant, _blocks(gm, regions), sites, largest)


def timestep_values(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    constant: Constant,
    timestep: Callable[[Sequence[str]], str],
    num_steps: int,
) -> TimestepValues | None:
    """What depends on the timestep alone, made inputs of ``gm``; None where it takes none, or nothing pays.

    ``timestep`` picks the timestep among the sources of the graph's inputs; "" if it is not there.
    """
    source = timestep([source_name(n) for n in gm.graph.nodes if n.op == "placeholder"])
    return take_out(gm, constant, source, _blocks(gm, regions), num_steps) if source else None


def without_marks(regions: Sequence[Region], hoisted: Hoisted | None) -> list[Region]:
    """The regions, those still marked lossless that were hoisted; the others are left to the schedule."""
    sites = hoisted.sites if hoisted is not None else frozenset[int]()
    return [
        replace(region, site=replace(region.site, lossless=False))
        if region.site.lossless and i not in sites
        else region
        for i, region in enumerate(regions)
    ]


def _blocks(gm: fx.GraphModule, regions: Sequence[Region]) -> dict[str, str]:
    """The block that each node belongs to, by name."""
    labels = block_labels([n for n in gm.graph.nodes if n.op not in ("placeholder", "output")], regions)
    return {node.name: block for node, block in labels.items()}
