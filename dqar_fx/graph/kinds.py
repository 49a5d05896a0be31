"""Of what kind an attention is: within one stream, across to another, or of two streams together."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import fx

from dqar_fx.graph.attentions import Roles
from dqar_fx.graph.capture import is_parameter
from dqar_fx.graph.effects import target_name
from dqar_fx.graph.owners import is_size


def kind_of(parts: Roles, exits: list[fx.Node], inside: set[fx.Node], bounded: bool) -> str:
    """``joint``: two streams leave, or there are more keys than queries; ``cross``: keys are of another stream."""
    if len(exits) > 1:
        return "joint"
    query, key = parts.query, parts.key
    if query is None or key is None:
        return "self"
    stop: Callable[[fx.Node], bool] = (lambda n: n not in inside) if bounded else (lambda n: n.op == "placeholder")
    from_query, from_key = _sources(query, stop), _sources(key, stop)
    if not from_query <= from_key or (from_key and not from_query):  # of none: queries that were learned
        return "cross"
    longer = parts.comparable and from_key - from_query and _length(query) != _length(key)
    return "joint" if longer or _joins_streams(query, inside) else "self"


def _joins_streams(query: fx.Node, inside: set[fx.Node]) -> bool:
    """True if the module puts queries of two streams end to end (the last block of SD3 drops the text's output)."""
    for node in _ancestors(query, lambda n: n not in inside):
        if node not in inside or target_name(node) not in ("cat", "concat", "concatenate"):
            continue  # outside it may be anything, such as the two halves of a rotary table
        if node.args and isinstance(node.args[0], (tuple, list)):
            parts = [_sources(n, lambda n: n not in inside) for n in node.args[0] if isinstance(n, fx.Node)]
            if any(not a <= b and not b <= a for a, b in itertools.combinations(parts, 2)):
                return True
    return False


def _sources(node: fx.Node, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The activations (not parameters) that ``node`` is made of, where ``stop`` ends the search."""
    ends = {n for n in _ancestors(node, stop) if n.op == "placeholder" or stop(n)}
    return {n for n in ends if not is_parameter(n) and not is_size(n)}


def _ancestors(node: fx.Node, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """``node`` and what it is made of, up to and including where ``stop`` ends the search."""
    visited: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in visited:
            visited.add(current)
            if not stop(current):
                pending.extend(current.all_input_nodes)
    return visited


def _length(node: fx.Node) -> object:
    value = node.meta.get("example_value")
    return value.shape[-2] if isinstance(value, torch.Tensor) and value.ndim >= 2 else None
