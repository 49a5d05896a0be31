"""What a node writes, what it aliases, and dead-code removal that respects both.

A Dynamo graph is not functional: models write in place (``x.data[...].copy_(y)``, ``h += g``, ``buf[i] = v``) and the
node that writes often has no user. ``Graph.eliminate_dead_code`` would delete it, silently. The passes here therefore
ask three questions before they move or remove a node: which arguments does it write, which storage is that, and who
else reads that storage. Aliasing is read off the fake tensors that Dynamo left in ``meta["example_value"]``: a view and
its base share one fake storage.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

_INPLACE_OPERATORS = frozenset(
    {
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.ipow,
        operator.iand,
        operator.ior,
        operator.ixor,
        operator.setitem,
    }
)

#: Functions that change the thread's mode. What stands between an opening and its closing one must stay together.
_MODE_CHANGES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in a (nested) example value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def storages(node: fx.Node) -> frozenset[int]:
    """Identities of the storages that the value of ``node`` lives in; empty for what is no tensor."""
    found = set()
    for tensor in tensors_of(node.meta.get("example_value")):
        try:
            found.add(int(StorageWeakRef(tensor.untyped_storage()).cdata))
        except (NotImplementedError, RuntimeError):  # sparse and some subclasses have no storage
            found.add(id(node))
    return frozenset(found)


def target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments of ``node`` that it writes in place (empty for a pure node)."""
    found: list[fx.Node] = []
    if node.op not in ("call_function", "call_method"):
        return found
    out = node.kwargs.get("out")
    if out is not None:
        found += [n for n in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(n, fx.Node)]
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                found += [n for n in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(n, fx.Node)]
    elif isinstance(first, fx.Node) and _writes_first_argument(node):
        found.append(first)
    return found


def _writes_first_argument(node: fx.Node) -> bool:
    if node.target in _INPLACE_OPERATORS:
        return True
    name = target_name(node)
    if name.endswith("_") and not name.endswith("__"):
        return True
    if node.op == "call_method" and name in ("__setitem__", "set_data"):
        return True
    if node.kwargs.get("inplace") is True:
        return True
    # torch.nn.functional activations take `inplace` as their last positional argument.
    module = getattr(node.target, "__module__", None) or ""
    return (
        node.op == "call_function"
        and module.startswith("torch.nn.functional")
        and name not in ("embedding", "embedding_bag", "interpolate", "pad")
        and len(node.args) > 1
        and node.args[-1] is True
        and name in ("relu", "relu6", "silu", "hardtanh", "hardswish", "elu", "selu", "celu", "mish", "leaky_relu", "dropout")
    )


def changes_mode(node: fx.Node) -> bool:
    """True for a node that opens or closes autocast, inference mode or the like."""
    return node.op == "call_function" and target_name(node) in _MODE_CHANGES


def must_keep(node: fx.Node) -> bool:
    """True for a node that has an effect of its own, whoever reads its value."""
    return node.op in ("placeholder", "output") or changes_mode(node) or _asserts(node)


def _asserts(node: fx.Node) -> bool:
    return node.op == "call_function" and "assert" in target_name(node)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that matter: what the output needs, plus every write into storage that something live or outside reads.

    A write counts as soon as any live node shares its storage, wherever that node stands: a little too careful (a write
    after the last read is kept), never wrong.
    """
    nodes = list(graph.nodes)
    writers = [(node, frozenset().union(*(storages(w) for w in written(node)))) for node in nodes if written(node)]
    live: set[fx.Node] = set()
    live_storages: set[int] = set()
    pending = [node for node in nodes if must_keep(node)]
    while pending:
        while pending:
            node = pending.pop()
            if node in live:
                continue
            live.add(node)
            live_storages |= storages(node)
            pending.extend(node.all_input_nodes)
        pending = [
            node
            for node, touched in writers
            if node not in live and (touched & live_storages or any(w.op == "placeholder" for w in written(node)))
        ]
    return live


def eliminate_dead_code(gm: fx.GraphModule) -> fx.GraphModule:
    """Remove, in place, what neither the output nor a live storage needs. Placeholders stay.

    Before::  n = norm(x); a = attend(n); y = x + stored
    After::   y = x + stored

    Unlike ``Graph.eliminate_dead_code`` this keeps an in-place write whose result nobody uses, when what it writes into
    is live or came from outside (placeholders are always live).
    """
    live = live_nodes(gm.graph)
    for node in reversed(list(gm.graph.nodes)):
        if node not in live:
            gm.graph.erase_node(node)
    return gm


def closure_forward(start: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """Nodes of ``within`` that depend on ``start`` (``start`` included)."""
    reached = set(start)
    pending = list(reached)
    while pending:
        for user in pending.pop().users:
            if user in within and user not in reached:
                reached.add(user)
                pending.append(user)
    return reached
