"""Take out of a graph what stays the same during a generation, so that it is computed once and kept.

What follows from parameters and the conditioning alone (``lossless.invariant``): projections of the prompt, keys and
values of the cross-attentions on it, tables of rotary embeddings and positions. Which of these values are kept is one
rule, ``Choice.pays``; everything else is as it was, so that a model in which nothing pays is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dqar_fx.graph.attentions import is_attention, is_product
from dqar_fx.graph.capture import fork, is_parameter
from dqar_fx.graph.effects import eliminate_dead_code, live_nodes, storages, target_name, tensors_of, written
from dqar_fx.graph.guard import guard_nodes, guard_number, unguard
from dqar_fx.graph.lossless import Constant, invariant

#: Elementwise kernels from which on a value is kept that is read in one block only. A compiler fuses fewer (the four
#: that make the frequencies of a timestep's embedding) into what reads them.
SEVERAL = 8
#: A value is not kept that is more than so many times as large as all that it is made of (a few numbers for each token,
#: projected to the model's width): it takes next to no work.
GROWTH = 4
#: Names of calls that multiply by matrices, beside products of two activations and attentions.
_WORK = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose", "multi_head_attention_forward")
#: Names of calls that only copy: no work that would be saved.
_COPIES = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "contiguous", "detach")


@dataclass(frozen=True, eq=False)
class Hoisted:
    """A graph whose unchanging part stands first.

    Attributes:
        gm: computes what it did before; the guards of ``sites`` are gone.
        first: the nodes of the unchanging part.
        kept: names of its values that the rest reads. They are new memory, which nothing writes into or returns.
        inputs: names of the conditioning inputs that it follows from.
        parameters: names of the parameters and other state of the module that it follows from.
        sites: the numbers of the sites all of whose work is in it.
        moved: for nodes that are in it only, the name there.
    """

    gm: fx.GraphModule
    first: frozenset[fx.Node]
    kept: tuple[str, ...]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    sites: frozenset[int]
    moved: Mapping[str, str]


def hoist(
    gm: fx.GraphModule, constant: Constant, blocks: Mapping[str, str], sites: Collection[int], largest: int
) -> Hoisted | None:
    """Compute first what stays the same and pays to be kept; None where nothing does. ``gm`` is left as it was.

    Before::  [block 0] k = linear(prompt, w0); y = attend(x, k)  [block 1] k1 = linear(prompt, w1); ...
    After::   k = linear(prompt, w0); k1 = linear(prompt, w1)     [block 0] y = attend(x, k)  [block 1] ...

    Sound because the nodes of the unchanging part depend on each other and on inputs alone, and keep their order; a
    value that shares memory with an input, with a result of the graph, or with anything that is written into is not
    kept. What the rest needs of it without its being kept (a view of the prompt) is computed in both.

    Args:
        gm: a guarded graph.
        constant: picks the inputs that stay the same.
        blocks: of each node, by name, the block that it belongs to; "" for none.
        sites: the guards of these (``Site.lossless``) are taken out if all of their work can be hoisted.
        largest: bytes of the largest tensor that a block hands on; a table that is larger is not kept.
    """
    wanted = frozenset(sites)
    while True:
        found = _hoist(unguard(gm, wanted), constant, blocks, largest)
        if found is None:
            return None
        left = _left(gm, found, wanted)
        if not left:
            return replace(found, sites=wanted)
        wanted -= left


def works(node: fx.Node) -> bool:
    """True for a call that multiplies matrices, convolves or attends: what FLOP are counted of."""
    if node.op not in ("call_function", "call_method"):
        return False
    return is_product(node) or is_attention(node) or target_name(node).startswith(_WORK)


def _hoist(gm: fx.GraphModule, constant: Constant, blocks: Mapping[str, str], largest: int) -> Hoisted | None:
    """``gm`` itself, rewritten; None, and ``gm`` as it was, if nothing pays."""
    choice = Choice(gm, invariant(gm, constant), blocks, largest)
    kept, alive = read_alone(gm, choice.kept())
    if not kept:
        return None
    alive.update(node.name for node in set(gm.graph.nodes) - live_nodes(gm.graph))  # what nobody read before stays, too
    needed = choice.needed(kept)
    copies: dict[fx.Node, fx.Node] = {}
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    with gm.graph.inserting_before(nodes[0]):
        for node in nodes:
            if node in needed:
                copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
                copies[node].meta = dict(node.meta)
    for node in kept:
        node.replace_all_uses_with(copies[node])
    for node in reversed(nodes):
        if node.name not in alive and not node.users:
            gm.graph.erase_node(node)
    left = set(gm.graph.nodes)
    gm.graph.lint()
    gm.recompile()
    given = [n for n in gm.graph.nodes if n in needed and isinstance(n.meta.get("example_value"), torch.Tensor)]
    given = [n for n in given if n.op == "placeholder"]
    return Hoisted(
        gm,
        frozenset(copies.values()),
        tuple(copies[node].name for node in kept),
        tuple(n.name for n in given if not is_parameter(n)),
        tuple(n.name for n in given if is_parameter(n)),
        frozenset(),
        {node.name: copy.name for node, copy in copies.items() if node not in left},
    )


def read_alone(gm: fx.GraphModule, kept: Sequence[fx.Node]) -> tuple[list[fx.Node], set[str]]:
    """Those of ``kept`` that are read if all are given, and the names of what is computed then."""
    rest = fork(gm)
    names = {node.name for node in kept}
    for node in [n for n in rest.graph.nodes if n.name in names]:
        with rest.graph.inserting_before(node):
            given = rest.graph.placeholder(f"kept_{node.name}")
        node.replace_all_uses_with(given)
    eliminate_dead_code(rest)
    users = {n.name: bool(n.users) for n in rest.graph.nodes}
    return [node for node in kept if users[f"kept_{node.name}"]], set(users)


class Choice:
    """Which values of a graph are kept.

    Args:
        gm: the graph.
        stays: its nodes that stay the same.
        blocks, largest: see ``hoist``.
    """

    def __init__(self, gm: fx.GraphModule, stays: set[fx.Node], blocks: Mapping[str, str], largest: int) -> None:
        self._nodes = list(gm.graph.nodes)
        self._stays = stays
        self._blocks = blocks
        self._largest = largest
        self._memory = {node: storages(node) for node in self._nodes}
        self._writers: dict[int, list[fx.Node]] = {}
        for node in self._nodes:
            for storage in {s for target in written(node) for s in self._memory[target]}:
                self._writers.setdefault(storage, []).append(node)
        result = self._nodes[-1]
        shared = (n for n in self._nodes if n.op in ("placeholder", "get_attr") or n in result.all_input_nodes)
        #: Memory that is not the unchanging part's own, or that does not stay as it was made.
        self._foreign = frozenset(self._writers).union(*(self._memory[n] for n in shared))

    def kept(self) -> list[fx.Node]:
        """The values to keep, in graph order: from the end backwards, what is not kept is read by the rest."""
        rest = set(self._nodes) - self._stays
        rest.update(node for nodes in self._writers.values() for node in nodes)
        kept = []
        for node in reversed(self._nodes):
            readers = [user for user in node.users if user in rest]
            if node in rest or node.op == "placeholder" or not readers:
                continue
            if self._can_keep(node) and self.pays(node, rest, {self._blocks.get(u.name, "") for u in readers}):
                kept.append(node)
            else:
                rest.add(node)
        return kept[::-1]

    def needed(self, values: Iterable[fx.Node], rest: Collection[fx.Node] = ()) -> set[fx.Node]:
        """All that ``values`` follow from, through memory too, inputs included; not what ``rest`` reads itself."""
        found: set[fx.Node] = set()
        pending = list(values)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending.extend(n for n in self._before(node) if n.op == "placeholder" or not _is_read(n, rest))
        return found

    def _before(self, node: fx.Node) -> list[fx.Node]:
        return [*node.all_input_nodes, *(w for s in self._memory[node] for w in self._writers.get(s, ()))]

    def _can_keep(self, node: fx.Node) -> bool:
        value, memory = node.meta.get("example_value"), self._memory[node]
        plain = isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)
        return plain and bool(memory) and self._foreign.isdisjoint(memory)

    def pays(self, value: fx.Node, rest: set[fx.Node], readers: set[str]) -> bool:
        """True if ``value`` is worth its memory. The rule, of the work behind it that only it stands for:

        * with a matrix product, a convolution or an attention it is, unless it was only blown up from less (keys
          repeated for each head; then what it was made of is), or is more than ``GROWTH`` times as large as all
          that;
        * without one it is if it is no larger than what a block hands on, and either several blocks read it, so that
          it is in memory throughout every step anyway (rotary tables), or at least ``SEVERAL`` kernels make it;
        * what is made of the model's own weights alone must be less than half of them: merged or unpacked weights
          would undo what they were stored apart, or packed, for.

        Views, casts and copies are no work; where several blocks look at one value, each in its way, that is kept.
        """
        if self._looks_at_shared(value):
            return False
        cone = self.needed([value], rest)
        size = self.bytes(value)
        if any(map(works, cone)):
            made = self._made_by(value)
            if not works(made) and size > sum(map(self.bytes, made.all_input_nodes)):
                return False
            sources = {
                n for node in cone for n in (node, *self._before(node)) if n.op == "placeholder" or n not in cone
            }
            if size > GROWTH * sum(map(self.bytes, sources)):
                return False
        elif size > self._largest:
            return False
        else:
            kernels = sum(map(self._computes, cone))
            if kernels and len(readers) > 1:
                return True
            if kernels < SEVERAL:
                return False
        given = [n for n in self.needed([value]) if n.op == "placeholder" and self._memory[n]]
        weights = sum(self.bytes(n) for n in given if is_parameter(n))
        return not weights or not all(map(is_parameter, given)) or 2 * size <= weights

    def _computes(self, node: fx.Node) -> bool:
        """True for a kernel that does more than copy."""
        called = node.op in ("call_function", "call_method") and bool(self._memory[node])
        return called and not self.is_view(node) and target_name(node) not in _COPIES

    def is_view(self, node: fx.Node) -> bool:
        """True if the value of ``node`` shares the memory of something that it is made of."""
        return bool(self._viewed(node))

    def _viewed(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if self._memory[node] & self._memory[n]]

    def _made_by(self, node: fx.Node) -> fx.Node:
        """What made the memory of a value."""
        while bases := self._viewed(node):
            node = bases[0]
        return node

    def _looks_at_shared(self, node: fx.Node) -> bool:
        """True for a view of something that several blocks read."""
        while bases := self._viewed(node):
            node = bases[0]
            if len({self._blocks.get(user.name, "") for user in node.users}) > 1:
                return True
        return False

    def bytes(self, node: fx.Node) -> int:
        """Bytes of the memory that the value of ``node`` lives in."""
        tensors = tensors_of(node.meta.get("example_value"))
        return max((number(t.untyped_storage().nbytes()) for t in tensors if t.layout is torch.strided), default=0)


def _is_read(node: fx.Node, rest: Collection[fx.Node]) -> bool:
    return any(user in rest for user in node.users)


def number(value: int | torch.SymInt) -> int:
    """A size; of a symbolic one, that of the call that was captured."""
    return value if isinstance(value, int) else int(value.node.hint or 0)


def _left(gm: fx.GraphModule, found: Hoisted, sites: Collection[int]) -> set[int]:
    """Those of ``sites`` some of whose work is not in the unchanging part."""
    rest = {n.name: n for n in found.gm.graph.nodes if n not in found.first}
    left = set()
    for guard in guard_nodes(gm.graph):
        if guard_number(guard) in sites:
            pending = [rest[n.name] for n in guard.all_input_nodes if n.name in rest]
            seen: set[fx.Node] = set()
            while pending:
                node = pending.pop()
                if node not in seen:
                    seen.add(node)
                    pending.extend(n for n in node.all_input_nodes if n not in found.first)
            if any(map(works, seen)):
                left.add(guard_number(guard))
    return left
