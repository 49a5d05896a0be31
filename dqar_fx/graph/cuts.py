"""Where to cut between two blocks, so that the compiler loses no fusion."""

from __future__ import annotations

import itertools

from torch import fx

from dqar_fx.graph.effects import changes_mode, inside_modes, must_keep, storages, target_name, written
from dqar_fx.graph.guard import reuse_or_compute

#: Cheap operations that a compiler fuses into whatever reads them.
_LIGHT = frozenset((
    "add", "sub", "mul", "truediv", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "where", "clamp", "clip", "mean",
    "tanh", "sigmoid", "silu", "gelu", "relu", "dropout", "layer_norm", "rms_norm",
    "to", "type_as", "float", "half", "bfloat16",
    "contiguous", "unsqueeze", "squeeze", "view", "reshape", "transpose", "permute", "flatten", "unflatten", "expand",
))  # fmt: skip


def sink(runs: list[tuple[str, list[fx.Node]]]) -> list[tuple[str, list[fx.Node]]]:
    """Move the elementwise tail of each run into the next one.

    Before::  [... ff = linear(h); y = x + gate * ff]  [n = layer_norm(y); ...]
    After::   [... ff = linear(h)]                     [y = x + gate * ff; n = layer_norm(y); ...]

    With the cut at the module's border the residual add would be a kernel of its own; moved, it fuses with the norm
    that reads it, as it does when the whole model is compiled at once. Sound because only pure nodes move, over nodes
    that do not depend on them; none that makes or reads storage which anything writes into, and none from inside a mode
    (autocast). A value that a later run than the next reads stays.
    """
    touched = frozenset().union(*(storages(w) for _, run in runs for n in run for w in written(n)))
    sunk = [(label, list(run)) for label, run in runs]
    for (_, run), (_, following) in itertools.pairwise(sunk):
        allowed = set(following)
        modes = inside_modes(run)
        moved: list[fx.Node] = []
        for node in reversed(run):
            if node.users and all(u in allowed for u in node.users) and node not in modes and _may_move(node, touched):
                moved.append(node)
                allowed.add(node)
        gone = set(moved)
        run[:] = [n for n in run if n not in gone]
        following[:0] = reversed(moved)
    return [(label, run) for label, run in sunk if run]


def _may_move(node: fx.Node, touched: frozenset[int]) -> bool:
    return (
        node.target is not reuse_or_compute
        and target_name(node) in _LIGHT
        and not must_keep(node)
        and not changes_mode(node)
        and not written(node)
        and not any(storages(n) & touched for n in (node, *node.all_input_nodes))
    )
