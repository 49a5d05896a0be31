"""Whether reading an attention back can pay at all, by a rule of thumb; asked on ``mps`` only.

Where nothing was measured, what cannot pay even by its own arithmetic is left computing: DQAR, which quantised and
wrapped whatever the schedule named, was 1.7 to 5.1 times slower on MPS than no reuse. A reading must save more time
than it takes, together with the one store that it needs at least::

    FLOP saved  >  FLOP_PER_BYTE * (bytes written + bytes read)  +  FLOP_PER_KERNEL * kernels added

FLOP saved are those of all that only the stored value needs (projections, attention), a multiply-add being two. Bytes
are those of the stored values. Kernels added are those that storing and reading take beyond what a block runs anyway,
as Inductor's Metal code generator emits them for a block of DiT (``tests/graph/test_kernels.py``). Both constants are
those of the Apple GPU on which reuse gains least, so that a site which is rewritten is worth a try on any; the estimate
does not say how much it gains. ``sites=`` has the last word, and so has a ``Plan``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import fx

from dqar_fx.config import DYNAMIC, CacheConfig
from dqar_fx.graph.flops import hint, node_flops
from dqar_fx.graph.sites import Region, Site

#: FLOP that the GPU could do while it moves a byte. M1: 2.6 TFLOP/s by 68 GB/s, the highest ratio of the M1 family (an
#: M1 Pro has 5.2 by 200: 26).
FLOP_PER_BYTE = 40
#: FLOP that the GPU could do while a small kernel runs: about 5 us (4.6 to 7.6 us on an M1 Pro, pytorch#148219), by
#: the 27 TFLOP/s of an M2 Ultra.
FLOP_PER_KERNEL = 1.4e8
#: Kernels that a store adds, by granularity of INT8: scales over more than a token are another reduction.
_STORE_KERNELS = {"token": 0, "channel": 1, "tensor": 2, "head": 2}
_BYTES = {"int8": 1.0, "int4": 0.5}


def why_it_cannot_pay(gm: fx.GraphModule, regions: Sequence[Region], cache: CacheConfig) -> list[str]:
    """For each region the reason to leave it computing, "" where it may pay, has a reason already, or is not on MPS.

    What has a size that is known only when it was computed may pay; symbolic sizes count as captured.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    asked = [not region.site.reason and _on_mps([nodes[name] for name in region.exits]) for region in regions]
    if not any(asked):
        return [""] * len(regions)
    flops = node_flops(gm)
    return [_reason(nodes, region, cache, flops) if ask else "" for region, ask in zip(regions, asked, strict=True)]


def _on_mps(exits: Sequence[fx.Node]) -> bool:
    return any(node.meta["example_value"].device.type == "mps" for node in exits)


def _reason(nodes: Mapping[str, fx.Node], region: Region, cache: CacheConfig, flops: Mapping[str, int]) -> str:
    saved = sum(flops.get(node.name, 0) for node in _skipped(nodes, region))
    size, kernels = 0.0, 0
    for name, role in zip(region.exits, region.roles or [""] * len(region.exits), strict=True):
        value = nodes[name].meta["example_value"]
        try:
            size += prod(map(hint, value.shape)) * _BYTES.get(cache.dtype_of(role), value.element_size())
        except TypeError:  # a size that nobody knows yet
            return ""
        kernels += kernels_added(cache, role)
    cost = FLOP_PER_BYTE * 2 * size + FLOP_PER_KERNEL * kernels
    if saved > cost:
        return ""
    return (
        f"reading it back cannot pay on mps, by estimate: it saves {saved / 1e6:.3g} MFLOP, and moving 2 x "
        f"{size / 1024:.3g} KiB with {kernels} more kernels costs as much as {cost / 1e6:.3g}. Name it in `sites` to "
        f"rewrite it all the same"
    )


def kernels_added(cache: CacheConfig, role: str) -> int:
    """Kernels that one store and one reading of an exit add on Metal.

    ``role`` is that of keys and values; "" for what leaves an attention, which meets a gate, a residual or a norm, and
    is read by their kernel. Keys and values stand between a library's kernels and have nothing to join.
    """
    dtype, alone = cache.dtype_of(role), bool(role)
    store = int(alone)
    if cache.balance == DYNAMIC and role != "value":  # the salience of channels; of keys, the queries undo it
        store += 2
    if dtype == "int4":
        store += 1 + (cache.group is not None)
    elif dtype == "int8":
        store += _STORE_KERNELS[cache.granularity]
    return store + (alone and dtype != "native")


def _skipped(nodes: Mapping[str, fx.Node], region: Region) -> list[fx.Node]:
    """What nobody needs where the exits are read back."""
    exits = {nodes[name] for name in region.exits}
    attentions = {nodes[name] for name in region.attentions}
    dead: set[fx.Node] = set()
    for node in reversed(list(nodes.values())):
        if node.op not in ("call_function", "call_method") or not node.users:
            continue
        if node not in exits:
            needed = any(user not in dead for user in node.users)
        elif region.roles:
            needed = any(user not in dead and user not in attentions for user in node.users)
        else:
            needed = any(user not in dead and user.name in region.inside for user in node.users)
        if not needed:
            dead.add(node)
    return list(dead)


def nothing_pays(sites: Sequence[Site]) -> str:
    """What to tell somebody whose model has no site left, because of these."""
    listed = "; ".join(f"{site.path or site.exits[:1]}: {site.reason}" for site in sites[:3])
    return (
        f"none of the {len(sites)} attentions of this model is rewritten ({listed}). The model is compiled as it is "
        f'and nothing is reused. `sites="*"` rewrites all that can be.'
    )
