"""LoRA adapters through diffusers and peft: loaded, chosen, fused and unloaded, between generations and inside one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import dqar_fx
from dqar_fx import Schedule
from tests.families import FLUX, NOTHING, SCHEDULE, assert_planned

# peft's own advice about a second adapter: that there are two is the point here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def lora(seed: int) -> dict[str, Tensor]:
    """The weights of an adapter of rank 4 on every attention, as a file holds them."""
    model = FLUX.make()
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    return {f"transformer.{name}": value for name, value in get_peft_model_state_dict(model).items()}


FIRST, SECOND = lora(1), lora(2)


def pipeline(model: Any) -> Any:
    """As much of a pipeline as LoRA loading needs."""
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)


def load(pipe: Any, weights: dict[str, Tensor], name: str, **settings: Any) -> None:
    copies = {key: value.clone() for key, value in weights.items()}  # what is loaded may share memory with the model
    pipe.load_lora_weights(copies, adapter_name=name, **settings)


#: What is done, one after the other, to one pipeline; and how many captures that costs at most.
CHANGES: list[tuple[str, Callable[[Any], object], int]] = [
    ("load a", lambda pipe: load(pipe, FIRST, "a"), 1),
    ("swap b into a", lambda pipe: load(pipe, SECOND, "a", hotswap=True), 0),
    ("swap a into a", lambda pipe: load(pipe, FIRST, "a", hotswap=True), 0),
    ("load b", lambda pipe: load(pipe, SECOND, "b"), 1),
    ("only a", lambda pipe: pipe.set_adapters("a"), 1),
    ("only b", lambda pipe: pipe.set_adapters("b"), 0),
    ("half of a", lambda pipe: pipe.set_adapters("a", 0.5), 1),
    ("a quarter of a", lambda pipe: pipe.set_adapters("a", 0.25), 1),
    ("three quarters of a", lambda pipe: pipe.set_adapters("a", 0.75), 0),
    ("both", lambda pipe: pipe.set_adapters(["a", "b"], [0.5, 0.25]), 1),
    ("off", lambda pipe: pipe.disable_lora(), 1),
    ("on", lambda pipe: pipe.enable_lora(), 0),
    ("fuse a", lambda pipe: pipe.fuse_lora(adapter_names=["a"]), 1),
    ("fuse b instead", lambda pipe: (pipe.unfuse_lora(), pipe.fuse_lora(adapter_names=["b"])), 1),
    ("unfuse", lambda pipe: pipe.unfuse_lora(), 0),
    ("delete b", lambda pipe: pipe.delete_adapters("b"), 1),
    ("unload", lambda pipe: pipe.unload_lora_weights(), 1),
]


def test_every_state_gives_what_the_eager_model_gives_at_one_capture_a_structure() -> None:
    model, plain = FLUX.optimized(NOTHING), FLUX.make()
    pipes = pipeline(model), pipeline(plain)
    assert torch.equal(FLUX.sample(model), FLUX.sample(plain))
    before = FLUX.sample(plain)
    for name, change, cost in CHANGES:
        captures = dqar_fx.runtime(model).stats.captures
        for pipe in pipes:
            change(pipe)
        expected = FLUX.sample(plain)
        assert torch.equal(FLUX.sample(model), expected), name
        assert name in {"on", "unfuse", "delete b"} or not torch.equal(expected, before), name
        assert dqar_fx.runtime(model).stats.captures <= captures + cost, name
        before = expected


def test_every_change_inside_a_generation_is_noticed() -> None:
    steps = 2 * len(CHANGES) + 2
    model, plain = FLUX.optimized(Schedule.always(steps)), FLUX.make()
    pipes = pipeline(model), pipeline(plain)
    runtime = dqar_fx.runtime(model)
    with runtime.generation(steps):
        for step in range(steps):
            runtime.begin_step(step)
            name = ""
            if step >= 2 and step % 2 == 0:
                name, change, _ = CHANGES[step // 2 - 1]
                for pipe in pipes:
                    change(pipe)
            got = FLUX.call(model, 0)
            actions = {d.action for d in runtime.stats.decisions if d.step == step}
            if step % 2:
                assert actions == {"reuse"}, CHANGES[step // 2 - 1][0] if step > 1 else "at the start"
            else:
                assert actions == {"compute"}, name
                assert torch.equal(got, FLUX.call(plain, 0)), name


def test_swapped_weights_of_equal_shape_need_no_capture_and_no_compilation() -> None:
    model = FLUX.optimized()
    load(pipeline(model), FIRST, "a")
    FLUX.sample(model)
    variants = dqar_fx.runtime(model).stats.variants
    load(pipeline(model), SECOND, "a", hotswap=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = FLUX.sample(model)
    assert dqar_fx.runtime(model).stats.variants == variants
    assert_planned(model, FLUX.sites)
    fresh = FLUX.make()
    load(pipeline(fresh), SECOND, "a")
    dqar_fx.optimize(fresh, SCHEDULE, backend="eager", cache=dqar_fx.CacheConfig(dtype="native"))
    assert torch.equal(got, FLUX.sample(fresh))
