"""What it saves to compute once what stays the same during a generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dqar_fx.graph.capture import is_parameter
from dqar_fx.graph.effects import storages
from dqar_fx.graph.flops import node_flops
from dqar_fx.graph.hoist import Hoisted, number


@dataclass(frozen=True, slots=True)
class Savings:
    """What is hoisted out of one graph, and what a step that is given it does without.

    Attributes:
        values: how many values are kept.
        bytes: of these; views of one memory count once.
        flops: of what need not be computed, in a step that reuses no attention.
        total_flops: of such a step in which nothing is hoisted.
        weight_bytes: of the parameters and buffers that need not be read.
        total_weight_bytes: of all that the graph reads.
    """

    values: int
    bytes: int
    flops: int
    total_flops: int
    weight_bytes: int
    total_weight_bytes: int

    @property
    def flop_share(self) -> float:
        """``flops / total_flops``, 0 where nothing is counted."""
        return self.flops / self.total_flops if self.total_flops else 0.0

    @property
    def weight_share(self) -> float:
        """``weight_bytes / total_weight_bytes``, 0 where no weight is read."""
        return self.weight_bytes / self.total_weight_bytes if self.total_weight_bytes else 0.0


#: Of a graph out of which nothing is hoisted.
NOTHING = Savings(0, 0, 0, 0, 0, 0)


def savings(hoisted: Hoisted) -> Savings:
    """Count it, on the graph. What is computed in both parts is not saved."""
    counts = node_flops(hoisted.gm)
    gone = {n for n in hoisted.first if n.name in hoisted.moved.values()}
    saved = sum(counts.get(n.name, 0) for n in gone)
    rest = sum(counts.get(n.name, 0) for n in hoisted.gm.graph.nodes if n not in hoisted.first)
    weights = [n for n in hoisted.gm.graph.nodes if n.op == "placeholder" and is_parameter(n) and n.users]
    unread = [n for n in weights if hoisted.first.issuperset(n.users)]
    kept = [n for n in hoisted.first if n.name in hoisted.kept]
    return Savings(len(kept), _bytes(kept), saved, saved + rest, _bytes(unread), _bytes(weights))


def _bytes(nodes: list[fx.Node]) -> int:
    """Bytes of the memory that the tensors live in."""
    memory: dict[frozenset[int], int] = {}
    for node in nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            memory[storages(node)] = number(value.untyped_storage().nbytes())
    return sum(memory.values())
