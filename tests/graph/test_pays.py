"""On MPS, what cannot pay by estimate is left computing, with the reason; whoever names sites has the last word."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.backend import make_runtime
from dqar_fx.graph import pays
from dqar_fx.graph.effects import tensors_of
from dqar_fx.graph.flops import site_savings
from dqar_fx.graph.inspect import capture_graphs
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.pays import FLOP_PER_BYTE, FLOP_PER_KERNEL, why_it_cannot_pay
from tests.models import make_dit, sample

KV = CacheConfig("kv")


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@functools.cache
def _captured(heads: int, dim: int, size: int) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=dim, in_channels=4, out_channels=4, num_layers=2,
            sample_size=size, patch_size=2, num_embeds_ada_norm=10,
        ).eval().requires_grad_(False)  # fmt: skip
        inputs = {"hidden_states": torch.empty(2, 4, size, size), "timestep": torch.full((2,), 900)}
        inputs["class_labels"] = torch.tensor([1, 2])
    return capture_graphs(model, inputs).graphs[0]


def captured(heads: int, dim: int, size: int, device: str = "mps") -> fx.GraphModule:
    """A DiT of two blocks of ``heads * dim`` for ``2 * (size / 2)^2`` tokens, as if captured on ``device``."""
    gm = _captured(heads, dim, size)
    for node in gm.graph.nodes:
        for tensor in tensors_of(node.meta.get("example_value")):
            tensor.fake_device = torch.device(device)  # type: ignore[attr-defined]  # every value there is a fake tensor
    return gm


def reasons(gm: fx.GraphModule, cache: CacheConfig) -> list[str]:
    return why_it_cannot_pay(gm, find_stored(gm, cache.target), cache)


def test_keys_and_values_of_a_small_model_cannot_pay_those_of_a_large_one_may() -> None:
    small, large = captured(2, 16, 8), captured(18, 64, 32)
    assert all("cannot pay on mps" in reason and "4 more kernels" in reason for reason in reasons(small, KV))
    assert reasons(large, KV) == ["", ""]
    assert reasons(small, CacheConfig()) == ["", ""]  # outputs take no kernel more
    assert all(reasons(small, CacheConfig(dtype="int4")))  # these do


def test_what_is_saved_is_what_the_runtime_would_not_run() -> None:
    gm = captured(18, 64, 32)
    nodes = {node.name: node for node in gm.graph.nodes}
    for cache in (CacheConfig(), KV):
        regions = find_stored(gm, cache.target)
        flops = pays.node_flops(gm)
        saved = [sum(flops.get(n.name, 0) for n in pays._skipped(nodes, region)) for region in regions]
        assert saved == site_savings(gm, regions)
    # Keys and values of 512 tokens, 1152 by 1152 each; one kernel to store and one to read for both.
    assert saved[0] == 2 * 2 * 512 * 1152 * 1152
    assert saved[0] > FLOP_PER_BYTE * 2 * 2 * 512 * 1152 + FLOP_PER_KERNEL * 4


def test_other_devices_are_not_asked() -> None:
    assert reasons(captured(2, 16, 8, "cuda"), KV) == ["", ""]
    assert reasons(captured(2, 16, 8, "cpu"), KV) == ["", ""]


def test_the_runtime_leaves_such_sites_alone_unless_they_are_named() -> None:
    gm = captured(2, 16, 8)
    schedule = Schedule.interval(6)
    runtime = make_runtime(schedule=schedule, cache=KV, backend="eager")
    with pytest.warns(UserWarning, match="none of the 2 attentions .* cannot pay on mps"):
        runtime.capture(gm)
    assert not runtime.sites
    assert [entry["reason"][:38] for entry in runtime.report().to_dict()["left_computing"]] == [
        "reading it back cannot pay on mps, by "
    ] * 2
    for chosen in ("*", ["transformer_blocks.0.*"], lambda site: True):
        runtime = make_runtime(schedule=schedule, cache=KV, backend="eager", sites=chosen)
        runtime.capture(gm)
        assert len(runtime.sites) == (1 if isinstance(chosen, list) else 2)
    runtime = make_runtime(schedule=schedule.plan(2), cache=KV, backend="eager")  # a plan is for all sites
    runtime.capture(gm)
    assert len(runtime.sites) == 2


def test_a_model_of_which_nothing_can_pay_is_compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pays, "_on_mps", lambda exits: True)
    model = make_dit()
    expected = sample(copy.deepcopy(model))
    dqar_fx.optimize(model, Schedule.interval(6, every=2), cache=KV, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match='compiled as it is and nothing is reused. `sites="\\*"`'):
        found = sample(model)
    runtime = dqar_fx.runtime(model)
    assert torch.equal(found, expected)
    assert runtime.stats.variants > 0  # it did not run as a plain graph
    assert runtime.stats.cache_bytes == runtime.stats.reused == 0
    assert "left computing: transformer_blocks.0" in str(runtime.report())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        sample(model)

    dqar_fx.restore(model)
    torch._dynamo.reset()
    dqar_fx.optimize(model, Schedule.interval(6, every=2), cache=KV, backend="eager", sites="*")
    sample(model)
    assert dqar_fx.runtime(model).stats.reused > 0
