"""Which exits are balanced (``CacheConfig(balance=...)``), and which are not and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dqar_fx.balance import Balance
from dqar_fx.config import DYNAMIC, CacheConfig
from dqar_fx.graph.attentions import argument, query_of
from dqar_fx.graph.sites import Region
from dqar_fx.graph.specialise import GIVEN, ExitLayout


@dataclass(slots=True)
class Balanced:
    """The layouts ``[site][exit]`` of one graph with their balancing settled.

    Attributes:
        layouts: as they were, those that are balanced marked.
        factors: of calibrated exits, by site and exit.
        reasons: for each site that should be balanced and is not, why.
    """

    layouts: list[list[ExitLayout]]
    factors: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


def settle_balance(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    layouts: Sequence[Sequence[ExitLayout]],
    cache: CacheConfig,
    plain: Collection[int],
) -> Balanced:
    """Mark what ``cache`` balances: outputs, or the keys of a ``scaled_dot_product_attention``; changes nothing else.

    ``plain``: the sites whose attention is a ``scaled_dot_product_attention`` in one piece with its guard. What is
    stored exactly has nothing to balance, and is not mentioned.

    Raises:
        CacheError: a calibrated balance that is another model's.
    """
    found = Balanced([list(own) for own in layouts])
    if cache.balance is None:
        return found
    nodes = {n.name: n for n in gm.graph.nodes}
    for site, (region, own) in enumerate(zip(regions, found.layouts, strict=True)):
        for index, layout in enumerate(own):
            if not layout.granularity or (region.roles and region.roles[index] == "value"):
                continue
            value = nodes[region.exits[index]].meta["example_value"]
            groups, reason = partner_of(nodes[region.attentions[0]], region, index, value, site in plain)
            if not reason and layout.late_size:
                reason = "its size is known only when it was computed"
            if not reason and not region.roles and cache.balance == DYNAMIC and not _has_batch(value, region):
                reason = "its first dimension is not that of the samples, which must not see each other"
            if reason:
                found.reasons[site] = reason
                continue
            mode = DYNAMIC
            if isinstance(cache.balance, Balance):
                mode = GIVEN
                found.factors[site, index] = cache.balance.of(exit_name(region, index), value.shape)
            own[index] = replace(layout, balance=mode, of_keys=bool(region.roles), groups=groups)
    return found


def partner_of(attention: fx.Node, region: Region, index: int, value: Tensor, plain: bool) -> tuple[int, str]:
    """How many heads of queries meet each head of an exit (1 where it is an output), or 0 and why it has no balance."""
    role = region.roles[index] if region.roles else ""
    if not role:
        return (1, "") if value.ndim > 2 else (0, "it has no dimension of tokens")
    if role == "both":
        return 0, "its keys are its values, which nothing could undo the balance of"
    if not plain:
        return 0, "its queries cannot be scaled: it is no plain scaled_dot_product_attention"
    return _groups(attention, value)


def exit_name(region: Region, index: int) -> str:
    """How a ``Balance`` names an exit."""
    return f"{region.key}/{index}"


def _has_batch(value: Tensor, region: Region) -> bool:
    return statically_known_true(value.shape[0] == region.batch)


def _groups(attention: fx.Node, key: Tensor) -> tuple[int, str]:
    """How many heads of queries share one of keys, or why the queries cannot be told apart by the heads of keys."""
    query = query_of(attention)
    value = query.meta.get("example_value") if query is not None else None
    if not isinstance(value, Tensor) or value.ndim != key.ndim or key.ndim < 3:
        return 0, "its queries and keys differ in their dimensions"
    same = [statically_known_true(a == b) for a, b in zip(value.shape[:-2], key.shape[:-2], strict=True)]
    if all(same):
        return 1, ""
    heads, shared = value.shape[-3], key.shape[-3]
    grouped = argument(attention, 7, "enable_gqa", False) is True
    known = type(heads) is int and type(shared) is int  # no symbols
    if grouped and known and all(same[:-1]) and heads % shared == 0:
        return heads // shared, ""
    return 0, "its queries and keys differ in samples or heads"
