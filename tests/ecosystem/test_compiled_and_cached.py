"""What else a user may do to the same model: torch.compile in all its forms, and the caches of diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from torch import Tensor, nn

import dqar_fx
from dqar_fx import RuntimeStateError, Schedule
from tests.families import FLUX, NATIVE, NUM_STEPS, SCHEDULE, assert_planned

PYRAMID = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(100, 950),
    current_timestep_callback=lambda: 500,
)
FIRST_BLOCK = FirstBlockCacheConfig(threshold=0.1)
FASTER = FasterCacheConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, tensor_format="BCHW"
)
CACHES = [PYRAMID, FIRST_BLOCK, FASTER]


def optimize(model: nn.Module) -> nn.Module:
    return dqar_fx.optimize(model, SCHEDULE, cache=NATIVE, backend="eager")


@pytest.fixture(scope="module")
def reused() -> Tensor:
    return FLUX.sample(FLUX.optimized())


def leaves_no_trace(refused: Callable[[Any], object], match: str) -> Any:
    """The model, after ``optimize`` was refused; it must be as it was."""
    model = FLUX.make()
    refused(model)
    before = dict(vars(model))
    with pytest.raises(RuntimeStateError, match=match):
        optimize(model)
    assert vars(model) == before
    return model


# -- compiled before --------------------------------------------------------------------------------------------------


def test_repeated_blocks_compiled_before_are_refused_and_the_advice_helps(reused: Tensor) -> None:
    model = leaves_no_trace(lambda m: m.compile_repeated_blocks(backend="eager"), r"transformer_blocks\.0 was compiled")
    for module in model.modules():
        module._compiled_call_impl = None
    assert torch.equal(FLUX.sample(optimize(model)), reused)


def test_a_block_replaced_by_its_compiled_self_is_refused_and_the_advice_helps(reused: Tensor) -> None:
    def compile_one(model: Any) -> None:
        model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0], backend="eager")

    model = leaves_no_trace(compile_one, r"transformer_blocks\.0\._orig_mod")
    model.transformer_blocks[0] = model.transformer_blocks[0]._orig_mod
    assert torch.equal(FLUX.sample(optimize(model)), reused)


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = FLUX.make()

    def forward(self, **inputs: Tensor) -> Any:
        return self.inner(**inputs)


def test_a_part_that_is_optimised_is_refused_and_the_advice_helps(reused: Tensor) -> None:
    model = Wrapper()
    optimize(model.inner)
    with pytest.raises(RuntimeStateError, match=r"restore\(model\.inner\)"):
        dqar_fx.optimize(model, SCHEDULE, cache=NATIVE, backend="eager", scheduler=None)
    dqar_fx.restore(model.inner)
    assert torch.equal(FLUX.sample(optimize(model.inner)), reused)


# -- compiled after ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_model_given_to_torch_compile_still_reuses(reused: Tensor, fullgraph: bool) -> None:
    model = FLUX.optimized()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    assert torch.equal(FLUX.sample(compiled), reused)
    assert dqar_fx.runtime(compiled) is dqar_fx.runtime(model)
    assert_planned(model, FLUX.sites)
    assert dqar_fx.runtime(model).stats.captures == 1
    with pytest.raises(RuntimeStateError, match="_orig_mod"):
        dqar_fx.restore(compiled)


def test_a_compiled_function_around_the_model_still_reuses(reused: Tensor) -> None:
    model = FLUX.optimized()
    captured: list[torch.fx.GraphModule] = []

    @torch.compile(backend=lambda gm, _: captured.append(gm) or gm.forward)
    def guided(**inputs: Tensor) -> Any:
        output = model(**inputs)
        output.sample = output.sample * 2 / 2
        return output

    assert torch.equal(FLUX.sample(guided), reused)
    assert_planned(model, FLUX.sites)
    assert captured
    assert not any("attention" in str(node.target) for gm in captured for node in gm.graph.nodes)


def test_a_compiled_module_around_the_model_still_reuses(reused: Tensor) -> None:
    model = Wrapper()
    optimize(model.inner)
    model.compile(backend="eager")
    assert torch.equal(FLUX.sample(model), reused)
    assert_planned(model.inner, FLUX.sites)


def test_one_graph_around_the_model_is_refused_with_the_reason() -> None:
    model = FLUX.optimized()

    @torch.compile(backend="eager", fullgraph=True)
    def step(**inputs: Tensor) -> Any:
        return model(**inputs)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compiled by dqar_fx\.optimize"):
        FLUX.call(step, 0)


@pytest.mark.parametrize("how", ["compile", "compile_repeated_blocks"])
def test_compiling_in_place_after_is_refused_and_changes_nothing(reused: Tensor, how: str) -> None:
    model = FLUX.optimized()
    with pytest.raises(RuntimeStateError, match=rf"{how}\(\).*restore"):
        getattr(model, how)(backend="eager")
    if how == "compile":
        assert torch.equal(FLUX.sample(model), reused)
    dqar_fx.restore(model)
    assert how not in vars(model)
    getattr(model, how)(backend="eager")


def test_a_block_compiled_after_is_noticed_at_the_next_capture() -> None:
    model = FLUX.optimized()
    model.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(RuntimeStateError, match=r"transformer_blocks\.0 was compiled"):
        FLUX.call(model, 0)


# -- caches of diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CACHES, ids=lambda c: type(c).__name__)
def test_a_cache_enabled_before_is_refused_and_the_advice_helps(config: object) -> None:
    model = leaves_no_trace(lambda m: m.enable_cache(config), rf"{type(config).__name__}.*disable_cache\(\)")
    model.disable_cache()
    optimize(model)


@pytest.mark.parametrize(
    "apply",
    [lambda m: apply_first_block_cache(m, FIRST_BLOCK), lambda m: apply_pyramid_attention_broadcast(m, PYRAMID)],
)
def test_a_cache_hung_on_parts_is_refused_and_the_advice_helps(apply: Callable[[Any], object]) -> None:
    from diffusers.hooks import HookRegistry

    model = leaves_no_trace(apply, r"a cache of diffusers hangs on .*remove_hook\('")
    with pytest.raises(RuntimeStateError) as refused:
        optimize(model)
    name = str(refused.value).rsplit("remove_hook('", 1)[1].split("'")[0]
    HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)
    optimize(model)


@pytest.mark.parametrize("config", CACHES, ids=lambda c: type(c).__name__)
def test_a_cache_enabled_after_is_refused_until_restored(config: object) -> None:
    model = optimize(FLUX.make())
    with pytest.raises(RuntimeStateError, match=r"enable_cache\(\).*restore"):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    dqar_fx.restore(model)
    assert "enable_cache" not in vars(model)
    model.enable_cache(config)
    assert model.is_cache_enabled


@pytest.mark.parametrize("sampled", [False, True])
def test_a_cache_hung_on_parts_after_is_refused_at_the_next_call(sampled: bool) -> None:
    model = FLUX.optimized()
    if sampled:
        FLUX.sample(model)
    apply_first_block_cache(model, FIRST_BLOCK)
    with pytest.raises(RuntimeStateError, match=r"a cache of diffusers hangs on"):
        FLUX.call(model, 0)


def test_a_copy_of_an_optimised_model_may_be_compiled_and_cached() -> None:
    model = optimize(FLUX.make())
    for name, argument in (("enable_cache", FIRST_BLOCK), ("compile", None), ("compile_repeated_blocks", None)):
        getattr(copy.deepcopy(model), name)(*[argument] if argument else ())


# -- many captures ----------------------------------------------------------------------------------------------------


def test_more_captures_than_dynamo_allows_by_itself() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return x + self.out(nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))

    model = dqar_fx.optimize(Tiny().eval(), Schedule.always(NUM_STEPS), backend="eager", dynamic=False)
    with torch.no_grad():
        for size in range(2, 14):
            for step in range(2):
                model(torch.ones(1, size, 8), torch.tensor(9 - step))
            assert dqar_fx.runtime(model).stats.reused == 1
    assert dqar_fx.runtime(model).stats.captures == 12
