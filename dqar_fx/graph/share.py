"""Compute once what many blocks compute alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from torch import fx

from dqar_fx.graph.attentions import is_attention
from dqar_fx.graph.capture import fork
from dqar_fx.graph.effects import changes_mode, must_keep, storages, target_name, written
from dqar_fx.graph.guard import reuse_or_compute
from dqar_fx.graph.partition import freeze

#: An expression is shared from this many occurrences on. Two (a DiT's last layer repeats block 0's conditioning) would
#: make the first block unlike the others, which then could not share its compiled piece: more to compile, little to
#: gain.
OCCURRENCES = 3
#: Parts of the names of operators whose results differ from call to call, or are written into as soon as they are made.
_NOT_A_FUNCTION = ("rand", "bernoulli", "multinomial", "normal", "poisson", "gumbel", "rrelu", "dropout", "empty")


def share_repeated(gm: fx.GraphModule) -> fx.GraphModule:
    """Common subexpressions over block borders, computed once at the start; ``gm`` is left as it was.

    Before::  [block 0] f = sin(t * w) ...  [block 1] f1 = sin(t * w) ...  [block 2] ...
    After::   f = sin(t * w)  [block 0] ...f...  [block 1] ...f...  [block 2] ...

    A compiler that sees the whole model does this by itself (each block of a DiT embeds the same timestep); one that
    sees a block at a time cannot. Exact: the same operators on the same inputs. What makes or reads storage
    that is written in place anywhere is left alone, and so is a graph that changes modes (autocast), where equal text
    may mean other numerics.
    """
    out = fork(gm)
    nodes = [n for n in out.graph.nodes if n.op in ("call_function", "call_method")]
    if any(changes_mode(n) for n in nodes):
        return out
    touched = frozenset().union(*(storages(w) for n in nodes for w in written(n)))
    number: dict[fx.Node, int] = {}  # equal nodes have equal numbers
    keys: dict[Hashable, int] = {}
    for node in out.graph.nodes:
        key = _expression(node, number) if node in nodes and _is_function(node, touched) else node
        number[node] = keys.setdefault(key, len(keys))
    occurrences = Counter(number.values())
    first: dict[int, fx.Node] = {}
    anchor = next(n for n in out.graph.nodes if n.op != "placeholder")
    for node in nodes:
        if occurrences[number[node]] < OCCURRENCES:
            continue
        if number[node] in first:
            node.replace_all_uses_with(first[number[node]])
            anchor = node.next if node is anchor else anchor
            out.graph.erase_node(node)
        elif all(a.op == "placeholder" or a in first.values() for a in node.all_input_nodes):
            first[number[node]] = node
            if node is anchor:
                anchor = node.next
            else:
                anchor.prepend(node)
            node.meta.pop("nn_module_stack", None)  # it belongs to no block any more
    out.graph.lint()
    out.recompile()
    return out


def _is_function(node: fx.Node, touched: frozenset[int]) -> bool:
    return not (
        must_keep(node)
        or written(node)
        or is_attention(node)
        or node.target is reuse_or_compute
        or any(storages(n) & touched for n in (node, *node.all_input_nodes))
        or any(name in target_name(node) for name in _NOT_A_FUNCTION)
    )


def _expression(node: fx.Node, number: dict[fx.Node, int]) -> Hashable:
    return (node.op, node.target, freeze(node.args, number), freeze(node.kwargs, number))
