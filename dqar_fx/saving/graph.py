"""A captured graph as bytes, with what the pass reads off it, and without any weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from dqar_fx.errors import SavedError
from dqar_fx.graph.capture import fork, readable, source_name

#: What the pass reads of a node: the value's looks, the modules it was traced in, and where an input is from.
_META = frozenset({"example_value", "nn_module_stack", "grapharg"})


@dataclass(frozen=True)
class Source:
    """Where an input of the graph is from, as Dynamo says it."""

    name: str


@dataclass(frozen=True)
class Argument:
    """What is kept of Dynamo's note on an input."""

    source: Source
    pass_arg_as_tensor: bool


@dataclass(frozen=True)
class _Value:
    """The looks of a fake tensor; ``storage`` tells those that share memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    parameter: bool
    storage: int
    nbytes: int


def dump_graph(gm: fx.GraphModule) -> bytes:
    """Write down a graph as Dynamo captured it, with fixed sizes.

    Raises:
        SavedError: it holds constants, sizes that are open, or operators that cannot be written.
    """
    out = fork(gm)
    storages: dict[Any, int] = {}
    for module in out.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                _reduce(node, storages)
    held = [name for name, value in _attributes(out) if isinstance(value, Tensor)]
    if held:
        raise SavedError(
            f"the captured graph holds constant tensors ({', '.join(held[:3])}), and what another process would have "
            f"in their place cannot be told. Such a model cannot be saved."
        )
    out.meta.clear()
    try:
        return GraphPickler.dumps(out, Options(ops_filter=None, node_metadata_key_filter=lambda key: key in _META))
    except Exception as error:  # whatever the reducers of the objects in it raise
        raise SavedError(f"the captured graph cannot be written down: {error}.") from error


def load_graph(data: bytes) -> fx.GraphModule:
    """The graph as if Dynamo had just captured it.

    Raises:
        SavedError: it cannot be read (an operator that torch writes down and does not find again).
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    try:
        gm = GraphPickler.loads(data, mode)
    except Exception as error:  # whatever the reducers of the objects in it raise
        raise SavedError(f"the captured graph cannot be written down and read again: {error}.") from error
    assert isinstance(gm, fx.GraphModule)
    made: dict[int, torch.UntypedStorage] = {}
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if "example_value" in node.meta:
                    value = node.meta["example_value"]
                    node.meta["example_value"] = tree_map_only(_Value, lambda v: _fake(v, made, mode), value)
            module.recompile()
    return gm


def _reduce(node: fx.Node, storages: dict[Any, int]) -> None:
    """Replace what lives in this process only."""
    if node.op == "placeholder":
        wrapped = bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))
        node.meta["grapharg"] = Argument(Source(source_name(node)), wrapped)
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {
        key: (path, kind if isinstance(kind, str) else kind.__name__) for key, (path, kind) in stack.items()
    }
    if "example_value" in node.meta:
        value = _all_looks(node, storages)
        for leaf in tree_leaves(value):
            if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                raise _open(node)
        node.meta["example_value"] = value


def _all_looks(node: fx.Node, storages: dict[Any, int]) -> Any:
    return tree_map_only(Tensor, lambda t: _looks(t, node, storages), node.meta.get("example_value"))


def _looks(value: Tensor, node: fx.Node, storages: dict[Any, int]) -> _Value:
    plain = value.layout == torch.strided and type(value) in (FakeTensor, torch.nn.Parameter)
    if not plain or torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise SavedError(
            f"the captured graph has a value that is no plain tensor ({node.name}, a {type(value).__name__}, "
            f"{value.layout}). Such a model cannot be saved."
        )
    storage = value.untyped_storage()
    sizes = (*value.shape, *value.stride(), value.storage_offset(), storage.nbytes())
    if any(isinstance(size, torch.SymInt) for size in sizes):
        raise _open(node)
    return _Value(
        tuple(value.shape), tuple(value.stride()), int(value.storage_offset()), value.dtype, value.device,
        value.requires_grad, isinstance(value, torch.nn.Parameter), storages.setdefault(storage._cdata, len(storages)),
        storage.nbytes(),
    )  # fmt: skip


def _open(node: fx.Node) -> SavedError:
    return SavedError(
        f"a size in the captured graph is open ({node.name}): it follows from values, or was marked as dynamic. Only "
        f"captures of fixed sizes can be saved."
    )


def _fake(value: _Value, made: dict[int, torch.UntypedStorage], mode: FakeTensorMode) -> Tensor:
    # By hand: in the mode itself, each of these operators would take ten times as long, for thousands of values.
    with no_dispatch(), torch.no_grad():
        if value.storage not in made:
            made[value.storage] = torch.empty(value.nbytes, dtype=torch.uint8, device="meta").untyped_storage()
        meta = torch.empty(0, dtype=value.dtype, device="meta")
        meta.set_(made[value.storage], value.offset, value.shape, value.stride)
        fake: Tensor = FakeTensor(mode, meta, value.device)
    if value.parameter:
        return torch.nn.Parameter(fake, requires_grad=value.requires_grad)
    return fake.requires_grad_(value.requires_grad)


def _attributes(gm: fx.GraphModule) -> list[tuple[str, Any]]:
    """What the graph's ``get_attr`` nodes, and those of the graphs within it, stand for."""
    found: list[tuple[str, Any]] = []
    for module in gm.modules():
        found += module._parameters.items()
        found += module._buffers.items()
        found += ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))
    return found


def same_graph(some: fx.GraphModule, other: fx.GraphModule) -> bool:
    """True if both have the same nodes, and values of the same looks that share memory alike."""
    if readable(some) != readable(other):
        return False
    storages: tuple[dict[Any, int], dict[Any, int]] = ({}, {})
    for one, two in zip(some.graph.nodes, other.graph.nodes, strict=True):
        looks = [_all_looks(node, seen) for node, seen in zip((one, two), storages, strict=True)]
        if looks[0] != looks[1] or source_name(one) != source_name(two):
            return False
    return True
