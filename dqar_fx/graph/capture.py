"""From Dynamo's graph to ours: forked, constants lifted, module paths cleaned."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass

import torch
from torch import fx

from dqar_fx.graph.effects import target_name

_PATH_NOISE = re.compile(r"\.__dict__\['_modules'\]\['([^']*)'\]|\._modules\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]")
_ROOT = re.compile(r"^L\['[^']*'\]")


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy the nodes and share parameters and metadata values, so that a pass can leave its input alone."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = copy.copy(node.meta)  # shallow: fake tensors must keep their (shared) storages
        if hasattr(node, "_dynamo_source"):  # all that tells where an input is from, once Dynamo is done
            mapping[node]._dynamo_source = node._dynamo_source
    return fx.GraphModule(gm, graph)


def clean_path(raw: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn`` -> ``blocks.0.attn``; "" for the root."""
    path = _ROOT.sub("", raw)
    path = _PATH_NOISE.sub(lambda m: "." + next(g for g in m.groups() if g is not None), path)
    return path.strip(".")


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One entry of a node's module stack: ``key`` tells two calls of the same module apart."""

    key: str
    path: str
    type_name: str


def module_stack(node: fx.Node) -> tuple[ModuleCall, ...]:
    """The modules that ``node`` was traced in, outermost first, without the root."""
    if node.op in ("placeholder", "output", "get_attr"):
        return ()  # Dynamo gives placeholders the stack of their first use, which means nothing here
    stack = node.meta.get("nn_module_stack") or {}
    calls = []
    for key, (raw, kind) in stack.items():
        path = clean_path(raw)
        if path:
            # Dynamo numbers the calls of a module under each of its names: a module shared by two parents has two.
            calls.append(ModuleCall(f"{key} {path}", path, kind if isinstance(kind, str) else kind.__name__))
    return tuple(calls)


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo took an input from, e.g. ``L['timestep']``; "" when it does not say."""
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def state_name(placeholder: fx.Node) -> str:
    """Name of the parameter or buffer that an input is, in the module whose forward was captured; "" for others."""
    source = source_name(placeholder)
    if not source.startswith("L['self']") or ("_parameters[" not in source and "_buffers[" not in source):
        return ""
    return clean_path(source).replace("._parameters.", ".").replace("._buffers.", ".")


def is_parameter(placeholder: fx.Node) -> bool:
    """True for an input that is state of the module (parameter, buffer, attribute), not an argument of the call."""
    if placeholder.op == "get_attr":
        return True
    if placeholder.op != "placeholder":
        return False
    source = source_name(placeholder)
    state = "_parameters[" in source or "_buffers[" in source or source.startswith("L['self'].")
    return state or bool(placeholder.meta.get("dqar_constant"))


def lift_constants(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Turn tensor attributes of the graph into trailing inputs, so that equal blocks can share one compiled piece.

    Before::  c = get_attr[_tensor_constant0]; y = x * c
    After::   inputs (x, c); y = x * c                     # and the list [c] to call it with
    """
    out = fork(gm)
    constants: list[torch.Tensor] = []
    names: dict[str, fx.Node] = {}
    first = next(n for n in out.graph.nodes if n.op != "placeholder")
    for node in list(out.graph.nodes):
        if node.op != "get_attr":
            continue
        value = attribute(gm, str(node.target))
        if not isinstance(value, torch.Tensor):
            continue  # a submodule (a higher-order operator's body): it stays an attribute
        if node.target not in names:
            with out.graph.inserting_before(first):
                lifted = out.graph.placeholder(f"constant_{len(constants)}")
            lifted.meta = {**node.meta, "dqar_constant": True}
            names[str(node.target)] = lifted
            constants.append(value)
        node.replace_all_uses_with(names[str(node.target)])
        if node is first:
            first = node.next
        out.graph.erase_node(node)
    out.recompile()
    return out, constants


def unwrap_scalars(gm: fx.GraphModule) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Python numbers that Dynamo passes as 0-d tensors (with ``dynamic=True``), as the numbers they are.

    Before::  inputs (x, s); n = s.item(); y = x * n
    After::   inputs (x, s); y = x * s                     # and (1,), the positions of the inputs to unwrap
    """
    out = fork(gm)
    positions = []
    for position, node in enumerate(n for n in list(out.graph.nodes) if n.op == "placeholder"):
        wrapped = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        if not wrapped or not node.users or any(u.target != "item" for u in node.users):
            continue
        for item in list(node.users):
            node.meta["example_value"] = item.meta.get("example_value")
            item.replace_all_uses_with(node)
            out.graph.erase_node(item)
        positions.append(position)
    out.recompile()
    return out, tuple(positions)


def attribute(module: torch.nn.Module, target: str) -> object:
    """What a ``get_attr`` node stands for."""
    return functools.reduce(getattr, target.split("."), module)


def readable(gm: fx.GraphModule) -> str:
    """The graph as text, one node a line: ``name = target(arguments)``. What ``diff`` compares and the tests read."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"input {node.name}")
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0])}")
        else:
            target = target_name(node)
            arguments = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
            if node.op == "call_method":
                target = f"{arguments.pop(0)}.{target}"
            lines.append(f"{node.name} = {target}({', '.join(arguments)})")
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_text(v) for v in value)
        return f"({inner}{',' if len(value) == 1 else ''})" if isinstance(value, tuple) else f"[{inner}]"
    return str(value) if isinstance(value, fx.Node) else repr(value)
