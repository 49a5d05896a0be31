"""What a node writes, what it aliases, and dead-code removal that respects both.

A Dynamo graph is not functional: models write in place (``x.data[...].copy_(y)``, ``h += g``, ``buf[i] = v``) and the
node that writes often has no user. ``Graph.eliminate_dead_code`` would delete it, silently. The passes here therefore
ask three questions before they move or remove a node: which arguments does it write, which storage is that, and who
else reads that storage. Aliasing is read off the fake tensors that Dynamo left in ``meta["example_value"]``: a view and
its base share one fake storage.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.multiprocessing.reductions import StorageWeakRef

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
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
_INPLACE_METHODS = frozenset({"set_data", *(f"__{f.__name__}__" for f in _INPLACE_OPERATORS)})

#: Activations of torch.nn.functional that take ``inplace`` as their last positional argument.
_INPLACE_ACTIVATIONS = frozenset(
    {"relu", "relu6", "silu", "hardtanh", "hardswish", "elu", "selu", "celu", "mish", "leaky_relu", "dropout"}
)

#: Functions that change the thread's mode, and those that change it back.
_OPENINGS = ("_enter_autocast", "_enter_inference_mode", "_vmap_increment_nesting")
_CLOSINGS = ("_exit_autocast", "_exit_inference_mode", "_vmap_decrement_nesting")
#: Functions that set the mode to what they are given: the same function changes it and changes it back.
_SETTERS = ("_set_grad_enabled", "_sdpa_kernel")


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
    return frozenset(storage_list(node))


def storage_list(node: fx.Node) -> list[int]:
    """``storages`` in the order of the tensors of the value."""
    return [_storage(t, node) for t in tensors_of(node.meta.get("example_value"))]


def _storage(tensor: torch.Tensor, node: fx.Node) -> int:
    try:
        return int(StorageWeakRef(tensor.untyped_storage()).cdata)  # type: ignore[no-untyped-call]  # torch's own
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none
        return id(node)


def has_late_size(node: fx.Node) -> bool:
    """True if a size in the value of ``node``, or the value itself, is known only when the graph runs (``nonzero``)."""
    value = node.meta.get("example_value")
    return bool(free_unbacked_symbols([value] if isinstance(value, _SYMBOLIC) else list(tensors_of(value))))


def finds_size(node: fx.Node) -> bool:
    """True for a call whose result has a size that depends on values (``nonzero``, a boolean mask, ``item``)."""
    return (
        node.op in ("call_function", "call_method")
        and has_late_size(node)
        and not any(has_late_size(argument) for argument in node.all_input_nodes)
    )


def target_name(node: fx.Node) -> str:
    """What ``node`` calls, without the module: ``add``, ``copy_``, ``scaled_dot_product_attention``."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments of ``node`` that it writes in place (empty for a pure node)."""
    if node.op not in ("call_function", "call_method"):
        return []
    targets: list[object] = [node.kwargs.get("out")]
    schemas = _schemas(node.target)
    for schema in schemas:
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = not argument.kwarg_only and position < len(node.args)
                targets.append(node.args[position] if given else node.kwargs.get(argument.name))
    if target_name(node) == "triton_kernel_wrapper_mutation":
        targets.append(node.kwargs.get("kwargs"))  # a kernel of the user's: it may write into whatever it is given
    elif not schemas and _writes_first_argument(node):
        targets.append(node.args[0] if node.args else dict(node.kwargs))
    return list(dict.fromkeys(_nodes(targets)))


def _nodes(argument: object) -> Iterator[fx.Node]:
    """Every node in a (nested) argument."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _nodes(item)
    elif isinstance(argument, dict):
        yield from _nodes(list(argument.values()))


def writers(nodes: Iterable[fx.Node], touched: frozenset[int]) -> list[fx.Node]:
    """Those of ``nodes`` that write into one of the storages ``touched``."""
    if not touched:
        return []
    return [node for node in nodes if any(storages(target) & touched for target in written(node))]


def _schemas(target: object) -> list[torch.FunctionSchema]:
    """The schemas of an operator from the dispatcher: of all its overloads, where the graph does not say which one."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]  # type: ignore[no-untyped-call]
    return [target._schema] if isinstance(target, torch._ops.OpOverload) else []


def _writes_first_argument(node: fx.Node) -> bool:
    name = target_name(node)
    if getattr(node.target, "__module__", "") == "_operator":
        return node.target in _INPLACE_OPERATORS  # `and_` and `or_` end like a method that writes, and do not
    if name.endswith("_") and not name.endswith("__"):
        return True
    if node.op == "call_method":
        return name in _INPLACE_METHODS
    last_is_inplace = name in _INPLACE_ACTIVATIONS and len(node.args) > 1 and node.args[-1] is True
    return last_is_inplace or node.kwargs.get("inplace") is True


def changes_mode(node: fx.Node) -> bool:
    """True for a node that opens or closes autocast, inference mode or the like."""
    return node.op == "call_function" and target_name(node) in (*_OPENINGS, *_CLOSINGS, *_SETTERS)


def mode_spans(nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, fx.Node | None]]:
    """From where to where the thread's mode differs; None where it is never changed back.

    A setter ends a span when it sets what the last one of its kind sets: the mode outside of all spans.
    """
    spans: list[tuple[fx.Node, fx.Node | None]] = []
    opened: list[fx.Node] = []
    setters: dict[str, list[fx.Node]] = {}
    for node in filter(changes_mode, nodes):
        name = target_name(node)
        if name in _OPENINGS:
            opened.append(node)
        elif name in _SETTERS:
            setters.setdefault(name, []).append(node)
        elif opened:
            spans.append((opened.pop(), node))
    spans += [(node, None) for node in opened]
    for changes in setters.values():
        start = None
        for node in changes:
            if start is None:
                start = node
            elif _setting(node) == _setting(changes[-1]):
                spans.append((start, node))
                start = None
        if start is not None:
            spans.append((start, None))
    return spans


def inside_modes(run: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes of a run between a change of mode and its end, where the same operator may compute something else."""
    position = {node: i for i, node in enumerate(run)}
    inside: set[fx.Node] = set()
    for start, end in mode_spans(run):
        inside.update(run[position[start] : position[end] if end is not None else None])
    return inside


def _setting(node: fx.Node) -> object:
    """What a setter sets. ``_sdpa_kernel`` is given backends that other calls (``_backend_from_string``) have named."""
    return [n.args for n in _nodes(node.args)] or node.args


def must_keep(node: fx.Node) -> bool:
    """True for a node that has an effect of its own, whoever reads its value."""
    return node.op in ("placeholder", "output") or changes_mode(node) or asserts(node)


def asserts(node: fx.Node) -> bool:
    """True for a check of the model's, or one that Dynamo has put in about a size."""
    return node.op == "call_function" and "assert" in target_name(node)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that matter: what the output needs, plus every write into storage that something live or outside reads.

    A write counts as soon as any live node shares its storage, wherever that node stands: a little too careful (a write
    after the last read is kept), never wrong.
    """
    nodes = list(graph.nodes)
    writing = {node: frozenset().union(*map(storages, written(node))) for node in nodes if written(node)}
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
            for node, touched in writing.items()
            if node not in live
            and (
                touched & live_storages or any(w in live or w.op in ("placeholder", "get_attr") for w in written(node))
            )
        ]
    return live


def eliminate_dead_code(gm: fx.GraphModule) -> fx.GraphModule:
    """Remove, in place, what neither the output nor a live storage needs. Placeholders stay.

    Before::  n = norm(x); a = attend(n); y = x + stored
    After::   y = x + stored

    Unlike ``Graph.eliminate_dead_code`` this keeps an in-place write whose result nobody uses, when what it writes into
    is live or came from outside (placeholders and attributes).
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


def depending_on(start: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """``closure_forward`` that also follows memory: what reads storage that something dependent writes into."""
    after = closure_forward(start, within)
    while True:
        memory = frozenset().union(*(storages(target) for node in after for target in written(node)))
        more = {node for node in within - after if storages(node) & memory}
        if not more:
            return after
        after = closure_forward(after | more, within)
