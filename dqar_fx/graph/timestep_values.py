"""What depends on the timestep but on no latent, taken out of a graph, so that all steps can be computed at once.

The layers that turn a timestep into a modulation (adaLN) are a small product of matrices in every block, with a few
rows: reading their weights is all that takes time, and they are 40 % of a DiT's. Where the timesteps of a run are known
before it, one product with the rows of all steps reads them once a generation instead of once a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from dqar_fx.graph.attentions import is_attention, is_product
from dqar_fx.graph.capture import fork, is_parameter, source_name
from dqar_fx.graph.hoist import Choice, read_alone, works
from dqar_fx.graph.lossless import Constant, invariant

#: A value may take as many bytes, over all steps, as the weights that it saves reading, and this in any case: where
#: matrices are that small, calling the kernels is what takes time.
SMALL = 256 * 1024
#: Steps that a run may have. A shorter one (to warm up) takes no more than these can, as what it settles stays settled.
USUAL = 50
#: Compiled kernels may count on their arguments beginning at a multiple of so many bytes.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class TimestepValues:
    """A graph that is given what depends on the timestep.

    Attributes:
        gm: computes what the graph did, with one more input for each value.
        names: of these inputs.
        table: computes the values from inputs of the graph.
        inputs: names of those, in calling order.
        timestep: name of the one that is the timestep.
        max_steps: for how many steps at once the values are worth their memory.
        step_bytes: of the values of one step.
        weight_bytes: of the parameters that only ``table`` reads.
        total_weight_bytes: of all parameters that the graph read.
    """

    gm: fx.GraphModule
    names: tuple[str, ...]
    table: fx.GraphModule
    inputs: tuple[str, ...]
    timestep: str
    max_steps: int
    step_bytes: int
    weight_bytes: int
    total_weight_bytes: int

    @property
    def weight_share(self) -> float:
        """``weight_bytes / total_weight_bytes``: 0.4 of a DiT-XL."""
        return self.weight_bytes / self.total_weight_bytes if self.total_weight_bytes else 0.0


def take_out(
    gm: fx.GraphModule, constant: Constant, timestep: str, blocks: Mapping[str, str], num_steps: int
) -> TimestepValues | None:
    """Make inputs of the values that follow from the timestep and the conditioning alone; None where none pays.

    Before::  inputs (x, t, label);  m = linear(silu(embed(t) + label), w); y = norm(x) * m
    After::   inputs (x, t, label, at_step_0);                              y = norm(x) * at_step_0
              and the table  inputs (t, label, w);  return linear(silu(embed(t) + label), w)

    Sound as ``hoist`` is: nothing that a latent reaches, through memory or not, is in the table. ``gm`` is left as it
    was.

    Args:
        gm: a guarded graph, its constants lifted.
        constant: picks the inputs that stay the same during a generation.
        timestep: source of the input that is the timestep.
        blocks: of each node, by name, the block that it belongs to; "" for none.
        num_steps: how many steps a run has.
    """
    gm = fork(gm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    given = next((n for n in placeholders if source_name(n) == timestep), None)
    if given is None or not isinstance(given.meta.get("example_value"), torch.Tensor):
        return None
    stays = invariant(gm, lambda sources: {*constant(sources), timestep})
    choice = _TimestepChoice(gm, stays, blocks, stays - invariant(gm, constant), num_steps)
    kept, alive = read_alone(gm, choice.kept())
    if not kept:
        return None
    needed = choice.needed(kept)
    max_steps = min(map(choice.max_steps, kept))
    total = sum(choice.bytes(n) for n in placeholders if is_parameter(n) and n.users)
    inputs = [n for n in placeholders if n in needed]
    table, mapping = fx.Graph(), {}
    for node in inputs:
        mapping[node] = table.placeholder(node.name)
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    for node in nodes:
        if node in needed:
            mapping[node] = table.node_copy(node, lambda n: mapping[n])
    table.output(tuple(mapping[node] for node in kept))
    names = []
    with gm.graph.inserting_before(nodes[0]):
        for i, node in enumerate(kept):
            value = gm.graph.placeholder(f"at_step_{i}")
            value.meta = {"example_value": node.meta["example_value"]}
            node.replace_all_uses_with(value)
            names.append(value.name)
    dead = {node for node in nodes if node.name not in alive}
    for node in reversed(nodes):
        if node in dead and not node.users:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return TimestepValues(
        gm,
        tuple(names),
        fx.GraphModule(gm, table),
        tuple(n.name for n in inputs),
        given.name,
        max_steps,
        sum(map(choice.bytes, kept)),
        sum(choice.bytes(n) for n in inputs if is_parameter(n) and not n.users),
        total,
    )


class _TimestepChoice(Choice):
    """Which values of a graph are computed for all steps at once.

    Args:
        gm, stays, blocks: see ``Choice``; what stays the same but for the timestep.
        timed: those of it that the timestep reaches.
        num_steps: see ``take_out``.
    """

    def __init__(
        self, gm: fx.GraphModule, stays: set[fx.Node], blocks: Mapping[str, str], timed: set[fx.Node], num_steps: int
    ) -> None:
        super().__init__(gm, stays, blocks, 0)
        self._timed = timed
        self._num_steps = max(num_steps, USUAL)

    def pays(self, value: fx.Node, rest: set[fx.Node], readers: set[str]) -> bool:
        """True for a product with weights that takes no more memory, over all steps, than they do.

        Not where tokens attend to each other behind it (a prompt refined anew at each step): that is work, which takes
        as long for all steps at once.
        """
        del rest, readers
        if value not in self._timed or not works(value) or self.is_view(value) or self.bytes(value) % ALIGNMENT:
            return False
        if any(is_attention(n) or is_product(n) for n in self.needed([value])):
            return False
        return self._num_steps <= self.max_steps(value)

    def max_steps(self, value: fx.Node) -> int:
        """For how many steps ``value`` may be kept."""
        weights = sum(self.bytes(n) for n in self.needed([value]) if n.op == "placeholder" and is_parameter(n))
        return max(weights, SMALL) // max(self.bytes(value), 1)
