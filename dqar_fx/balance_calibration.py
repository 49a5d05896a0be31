"""Runs of a model that are watched: to calibrate its balance, and to measure what balancing is worth.

The model runs as its own graphs, node by node, so what is seen is exactly what a compute step would store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dqar_fx.balance import (
    Balance,
    calibrated_salience,
    fold_into_query,
    key_factors,
    output_factors,
    query_salience,
    salience,
)
from dqar_fx.checks import check_model
from dqar_fx.config import DYNAMIC, CacheConfig
from dqar_fx.errors import CacheError, CaptureError
from dqar_fx.graph.attentions import query_of
from dqar_fx.graph.balancing import Balanced, exit_name, partner_of, settle_balance
from dqar_fx.graph.guard import guard_number, guard_sites, reuse_or_compute
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.measure import can_tell_entropy
from dqar_fx.graph.sites import Region
from dqar_fx.graph.specialise import exit_layout

#: The three ways that are compared.
MODES = ("plain", "dynamic", "calibrated")


@dataclass(frozen=True, slots=True)
class Seen:
    """One attention at one call: what would be stored, and what takes part."""

    graph: Watched
    site: int  # in the graph
    exits: tuple[Tensor, ...]
    query: Tensor | None  # of keys and values; None where outputs are stored
    #: What a ``scaled_dot_product_attention`` gives for a query and keys, all else as it is.
    attend: Callable[[Tensor, Tensor], Tensor]


@dataclass(slots=True)
class Watched:
    """One captured graph."""

    gm: fx.GraphModule
    regions: list[Region]
    #: By cache and mode: how its exits are stored.
    settled: dict[tuple[str, str], Balanced] = field(default_factory=dict)

    @property
    def plain(self) -> frozenset[int]:
        """The sites whose attention is a ``scaled_dot_product_attention``."""
        nodes = {n.name: n for n in self.gm.graph.nodes}
        return frozenset(i for i, r in enumerate(self.regions) if all(can_tell_entropy(nodes[a]) for a in r.attentions))


class _Watch(fx.Interpreter):
    """Runs a guarded graph and shows what reaches its guards."""

    def __init__(self, gm: fx.GraphModule, graph: Watched, show: Callable[[Seen], None]) -> None:
        super().__init__(gm)
        self._graph, self._show = graph, show
        self._nodes = {n.name: n for n in gm.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is reuse_or_compute:
            site = guard_number(n)
            region = self._graph.regions[site]
            attention = self._nodes[region.attentions[0]]
            query = query_of(attention) if region.roles else None

            def attend(query: Tensor, key: Tensor) -> Tensor:
                return self._attend(attention, region, tuple(result), query, key)

            self._show(Seen(self._graph, site, tuple(result), None if query is None else self.env[query], attend))
        return result

    def _attend(
        self, attention: fx.Node, region: Region, exits: tuple[Tensor, ...], query: Tensor, key: Tensor
    ) -> Tensor:
        # Keys and values that the guard hands on are not there yet: it has just run. All else has been computed.
        args: Any = fx.node.map_arg(attention.args, self.env.get)
        kwargs: Any = fx.node.map_arg(attention.kwargs, self.env.get)
        others = {name: given for name, given in kwargs.items() if name not in ("query", "key", "value")}
        if "value" in region.roles:
            value = exits[region.roles.index("value")]
        else:
            value = args[2] if len(args) > 2 else kwargs["value"]
        attended: Tensor = attention.target(query, key, value, *args[3:], **others)  # type: ignore[operator]  # a function
        return attended


@contextmanager
def watching(
    model: nn.Module, target: str, take: Callable[[Watched], None], show: Callable[[Seen], None]
) -> Iterator[None]:
    """While this lasts, ``take`` is called with each graph of ``model``, and ``show`` with each attention that runs.

    Raises:
        CaptureError, RuntimeStateError: the model cannot be watched, as ``optimize``; in the call, if it is more than
            one graph.
    """
    check_model(model)
    refusals: list[CaptureError] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            refusals.append(
                CaptureError(
                    f"{type(model).__name__} is captured in several graphs ({str(reason.reason).splitlines()[0]}), "
                    f"whose sites cannot be told apart by name. Balance it without calibration: balance='dynamic'."
                )
            )
        regions = [region for region in find_stored(gm, target) if not region.site.reason]
        graph = Watched(gm, regions)
        if not refusals:
            take(graph)
        guarded = guard_sites(gm, regions)

        def run(*arguments: Any) -> Any:
            return _Watch(guarded, graph, (lambda _: None) if refusals else show).run(*arguments)

        return run

    torch._dynamo.reset()
    model._compiled_call_impl = torch.compile(model._call_impl, backend=backend)
    try:
        with torch.no_grad():
            yield
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()
    if refusals:
        raise refusals[0]


# -- calibrating --------------------------------------------------------------------------------------------------


def calibrate_balance(model: nn.Module, run: Callable[[], object], target: str = "output") -> Balance:
    """Factors for ``CacheConfig(balance=...)``, from the saliences of the calls that ``run`` makes of ``model``.

    For each head of keys, the saliences of keys and queries at all calls are made one by PTQ4DiT's eq. 10 and 11, with
    the same weights for both (there a weight stands in the place of the query, and is the same at all timesteps). An
    output meets no weight that it could be ranked with: its calls count alike.

    Args:
        model: the denoiser, not optimised; afterwards it is as it was.
        run: samples, a few steps will do: ``lambda: pipe("a cat", num_inference_steps=8)``. A call is a timestep.
        target: what is going to be stored, ``"output"`` or ``"kv"``.

    Raises:
        CaptureError, RuntimeStateError: the model cannot be optimised, or is more than one graph.
        CacheError: ``target`` is unknown, or ``run`` did not call the model, or nothing of it can be balanced.
    """
    CacheConfig(target)  # refuses an unknown target
    partners: dict[int, list[list[int]]] = {}  # by graph: [site][exit], see ``partner_of``
    own: dict[str, list[Tensor]] = {}
    others: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    calls = 0

    def take(graph: Watched) -> None:
        nodes, plain = {n.name: n for n in graph.gm.graph.nodes}, graph.plain
        partners[id(graph)] = [
            [
                partner_of(nodes[r.attentions[0]], r, index, nodes[name].meta["example_value"], site in plain)[0]
                if not (r.roles and r.roles[index] == "value")
                else 0
                for index, name in enumerate(r.exits)
            ]
            for site, r in enumerate(graph.regions)
        ]

    def show(seen: Seen) -> None:
        region = seen.graph.regions[seen.site]
        for index, groups in enumerate(partners[id(seen.graph)][seen.site]):
            if not groups:
                continue
            name, value = exit_name(region, index), seen.exits[index]
            sizes[name] = value.ndim
            if seen.query is None:
                own.setdefault(name, []).append(salience(value, tuple(range(value.ndim - 1))).flatten().float().cpu())
            else:
                for table, found in ((own, salience(value, -2)), (others, query_salience(seen.query, groups))):
                    table.setdefault(name, []).append(found.amax(0, keepdim=True).float().cpu())

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_pre_hook(count)
    try:
        with watching(model, target, take, show):
            run()
    finally:
        handle.remove()
    if not own:
        why = "nothing of it can be balanced" if calls else "`run` did not call the model"
        raise CacheError(f"no balance can be calibrated for {type(model).__name__}: {why}.")
    factors = {}
    for name, found in own.items():
        if target == "kv":
            x, w = torch.stack(found), torch.stack(others[name])
            common, eta = calibrated_salience(x, w)
            factors[name] = key_factors(common, (eta.unsqueeze(-1) * w.double()).sum(0)).contiguous()
        else:
            common = torch.stack(found).double().mean(0)
            factors[name] = output_factors(common).reshape((1,) * (sizes[name] - 1) + (-1,))
    return Balance(target, factors, calls)


# -- measuring ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Error:
    """What rounding has done to a value, over all calls: sums of squares in float64."""

    noise: float = 0.0
    signal: float = 0.0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """Another call."""
        self.noise += float((rounded.double() - exact.double()).square().sum())
        self.signal += float(exact.double().square().sum())

    @property
    def relative(self) -> float:
        """``|rounded - exact| / |exact|``, L2; 0 where both are 0."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0


def decibels(relative: float) -> float | None:
    """A relative error as signal to quantisation noise, in dB; None where there is no error."""
    return -20 * math.log10(relative) if relative > 0 else None


def measure_balance(
    model: nn.Module, run: Callable[[], object], caches: Sequence[CacheConfig], balance: Balance
) -> dict[str, dict[str, dict[str, dict[str, Error]]]]:
    """The quantisation error of what ``caches`` store, each as it is, balanced dynamically, and by ``balance``.

    The values are those of ``run`` (see ``calibrate_balance``), at every call; nothing is reused, so nothing but the
    rounding is in these errors. For keys, ``attention`` is the error of what the attention then gives for its own
    queries and exact values.

    Returns:
        By cache (as text), mode (``MODES``; those that cannot be are missing), site, and ``"value"`` or
        ``"attention"``: the error over all calls and exits of the site.
    """
    found: dict[str, dict[str, dict[str, dict[str, Error]]]] = {}

    def take(graph: Watched) -> None:
        for cache in caches:
            for mode, given in zip(MODES, (None, DYNAMIC, balance), strict=True):
                if mode != "plain" and not can_balance(cache):
                    continue
                nodes = {n.name: n for n in graph.gm.graph.nodes}
                layouts = [
                    [
                        exit_layout(nodes[name].meta["example_value"], cache, r.site.heads, r.batch, role)
                        for name, role in zip(r.exits, r.roles or [""] * len(r.exits), strict=True)
                    ]
                    for r in graph.regions
                ]
                settled = settle_balance(graph.gm, graph.regions, layouts, replace(cache, balance=given), graph.plain)
                graph.settled[str(cache), mode] = settled

    def show(seen: Seen) -> None:
        region = seen.graph.regions[seen.site]
        for (cache, mode), settled in seen.graph.settled.items():
            for index, value in enumerate(seen.exits):
                layout = settled.layouts[seen.site][index]
                role = region.roles[index] if region.roles else ""
                if role == "value" or not layout.granularity:
                    continue
                given = settled.factors.get((seen.site, index))
                beside = [given.to(value.device)] if given is not None else [seen.query] if layout.of_keys else []
                parts = layout.pack(value, *beside)
                parts = parts if given is None else (*parts, *beside)
                errors = found.setdefault(cache, {}).setdefault(mode, {}).setdefault(region.key, {})
                errors.setdefault("value", Error()).add(value, layout.unpack(*parts))
                if role != "key" or seen.site not in seen.graph.plain:
                    continue
                query, key = seen.query, layout.unpack(*parts, folded=True)
                assert query is not None
                exact = seen.attend(query, value)
                query = fold_into_query(query, parts[2], layout.groups) if layout.balance else query
                errors.setdefault("attention", Error()).add(exact, seen.attend(query, key))

    with watching(model, balance.target, take, show):
        run()
    return found


def can_balance(cache: CacheConfig) -> bool:
    """True if ``cache`` may have a balance: what is balanced is rounded, by scales that several channels share."""
    return cache.dtypes[0] != "native" and cache.granularity != "channel"
