"""What is exported: one captured graph, its inputs, its weights, and which of its values the model hands back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dqar_fx.backend import CaptureBackend, make_runtime
from dqar_fx.calls import forward_names, plain_call
from dqar_fx.compiled import isolation, state_names
from dqar_fx.config import CacheConfig
from dqar_fx.errors import CaptureError, DqarError, ExportError
from dqar_fx.graph.capture import is_parameter, lift_constants, source_name, state_name
from dqar_fx.graph.inspect import describe, first_line
from dqar_fx.graph.partition import Piece, whole
from dqar_fx.graph.share import share_repeated
from dqar_fx.graph.sites import Site
from dqar_fx.graph.specialise import ExitLayout
from dqar_fx.plan import Plan
from dqar_fx.runtime.cache import ExitSpec
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.plans import reading_exact
from dqar_fx.runtime.program import CapturedGraph
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.schedule import Schedule

_KEYS = re.compile(r"\['([^']*)'\]|\[(\d+)\]")
#: From an argument of the forward to a tensor in it.
Way = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that the model hands back: its place in what the model returns, and in the outputs of the graph."""

    path: str
    position: int
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Source:
    """One model on given inputs.

    Attributes:
        model: its class.
        plan: what a generation does.
        sites: those that are rewritten.
        piece: the guarded graph, whole.
        inputs: of ``piece``, those that are arguments of a call, by name: the way from the forward's argument to the
            tensor, and the tensor.
        weights: of ``piece``, its other inputs by name: parameters, buffers and constants, contiguous, and their names.
        layouts, specs: how each exit is stored, ``[site][exit]``.
        outputs: what the model hands back.
    """

    model: str
    plan: Plan
    sites: tuple[Site, ...]
    piece: Piece
    inputs: dict[str, tuple[Way, torch.Tensor]]
    weights: dict[str, tuple[str, torch.Tensor]]
    layouts: Sequence[Sequence[ExitLayout]]
    specs: Sequence[Sequence[ExitSpec]]
    outputs: tuple[Output, ...]


def capture(
    model: nn.Module, plan: Plan | Schedule, args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: CacheConfig
) -> Source:
    """Capture ``model`` on these arguments, with static sizes, as one graph.

    Raises:
        ExportError: they do not fit the model, it is not one graph, or has what no package has a place for.
        CaptureError: it has no attention.
        PlanError: the plan is for another number of sites.
    """
    name = type(model).__name__
    runtime = _Recording(plan, cache)
    runtime.state_names = state_names(model)
    names = forward_names(model)
    timestep = timestep_argument(names)
    runtime.latents = next((n for n in names if timestep is None or n != timestep[0]), "")
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
        with torch.no_grad():
            plain_call(model)(*args, **kwargs)
    except Exception as error:
        given = describe({**{str(i): value for i, value in enumerate(args)}, **kwargs})
        raise ExportError(
            f"{name} cannot run the inputs {given}: {first_line(error)}. Give the arguments of one call, of the sizes "
            f"that the package is for."
        ) from error
    compiled = torch.compile(
        plain_call(model), backend=CaptureBackend(runtime, delimited=True), dynamic=False, fullgraph=True, **isolation()
    )
    try:
        with torch.no_grad():
            result = compiled(*args, **kwargs)
    except DqarError:
        raise
    except Exception as error:
        raise ExportError(
            f"{name} is not one graph, and only that can be exported: {first_line(error)}. `dqar-fx explain` shows "
            f"where graphs break."
        ) from error
    if len(runtime.ran) != 1:
        raise ExportError(
            f"{name} ran in {len(runtime.ran)} graphs, and only one can be exported. Is Dynamo disabled here?"
        )
    (graph, arguments, returned) = runtime.ran[0]
    if graph.has_late_sizes:
        raise ExportError(f"{name} finds sizes in values (a boolean mask, nonzero, item), which no package can fix.")
    if not graph.num_sites:
        raise CaptureError(f"no attention was found in {name}, so it has no steps to tell apart. Use torch.export.")
    lifted, constants = lift_constants(graph.guarded)
    lifted = share_repeated(lifted)
    piece = whole(lifted)
    inputs, weights = _arguments(lifted, [*arguments, *constants], piece.inputs)
    sites = tuple(region.site for region in graph.regions)
    exact = [site.index for site in sites if site.lossless]
    return Source(
        model=name,
        plan=reading_exact(plan.plan(len(sites)), exact),
        sites=sites,
        piece=piece,
        inputs=inputs,
        weights=weights,
        layouts=graph.layouts,
        specs=graph.specs(()),
        outputs=_outputs(name, result, returned, lifted, piece),
    )


class _Recording(Runtime):
    """Takes a graph in and runs it as it is, noting what with."""

    def __init__(self, plan: Plan | Schedule, cache: CacheConfig) -> None:
        made = make_runtime(schedule=plan, cache=cache, backend="eager")  # checks them
        super().__init__(made.schedule, cache, None, None, _never)
        self.ran: list[tuple[CapturedGraph, list[Any], list[Any]]] = []

    def run(self, graph: CapturedGraph, arguments: Sequence[Any]) -> list[Any]:
        """Compute."""
        result = list(graph.captured.forward(*arguments))
        self.ran.append((graph, list(arguments), result))
        return result


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is compiled here")


def _arguments(
    gm: fx.GraphModule, values: Sequence[Any], used: Sequence[str]
) -> tuple[dict[str, tuple[Way, torch.Tensor]], dict[str, tuple[str, torch.Tensor]]]:
    """The inputs and the weights among the placeholders that are ``used``."""
    inputs: dict[str, tuple[Way, torch.Tensor]] = {}
    weights: dict[str, tuple[str, torch.Tensor]] = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, values, strict=True):
        if node.name not in used:
            continue
        source = source_name(node)
        if not isinstance(value, torch.Tensor):
            raise ExportError(f"{source or node.name} is a {type(value).__name__} that the graph takes as it comes.")
        value = value.detach().contiguous()
        if is_parameter(node):
            weights[node.name] = state_name(node) or source or node.name, value
        else:
            inputs[node.name] = _path(source) or (source or node.name,), value
    return inputs, weights


def _path(source: str) -> Way:
    """``L['added_cond_kwargs']['sizes'][0]`` -> ``("added_cond_kwargs", "sizes", 0)``."""
    keys = tuple(name or int(index) for name, index in _KEYS.findall(source))
    return keys[1:] if keys[:1] == ("kwargs",) and len(keys) > 1 else keys


def _outputs(name: str, result: Any, returned: Sequence[Any], gm: fx.GraphModule, piece: Piece) -> tuple[Output, ...]:
    """Where the tensors of ``result`` come from: Dynamo hands on what the graph ``returned``."""
    nodes = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    found = []
    for path, leaf in _tensors(result):
        position = next((i for i, value in enumerate(returned) if value is leaf), None)
        node = nodes[position] if position is not None else None
        if node is None or node.name not in piece.outputs:
            raise ExportError(
                f"{name} hands back a tensor ({path or 'its result'}, {list(leaf.shape)}) that its graph has "
                f"not made: an input as it came, or something that Python made of it."
            )
        found.append(Output(path, piece.outputs.index(node.name), leaf))
    if not found:
        raise ExportError(f"{name} hands back a {type(result).__name__}, in which no tensor can be found.")
    return tuple(found)


def _tensors(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a result, with the way to each: ``"sample"``, ``"0.1"``."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (Mapping, tuple, list)):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{path}.{key}" if path else str(key))
