"""What stays the same during a generation is computed once: to the bit what the eager model gives, whatever happens."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.graph.lower import Lowerer, resolve_backend
from dqar_fx.runtime import sizes
from dqar_fx.runtime.lossless import _copied
from tests.counting import CountsProducts
from tests.graph.conftest import WIDTH, Attention, tokens
from tests.graph.test_lossless import Cross
from tests.zoo import images, videos
from tests.zoo.case import Case, build

STEPS = 5
#: Reuses the first site at one step: the others compute what the eager model computes.
REUSED = 3
SCHEDULE = Schedule.custom(STEPS, lambda step, site, *_: step == REUSED and site == 0)
#: Projections of the prompt, and of nothing else, in each small model.
PROJECTIONS = {
    "PixArtTransformer2DModel": 2 + 2 * 2 + 2 * 2,  # the caption, resolution and aspect ratio, keys and values
    "WanTransformer3DModel": 2 + 2 + 2 * (2 + 2),  # text and image, keys and values of both
    "SD3Transformer2DModel": 2 + 1,  # the pooled embedding, and the whole one
    "FluxTransformer2DModel": 2 + 2 + 1,  # the same, and guidance
    "CogVideoXTransformer3DModel": 1,
}
CASES: dict[str, Case] = {**images.CASES, **videos.CASES}


pytestmark = pytest.mark.usefixtures("fresh_inference")


def optimized(model: nn.Module, schedule: Schedule = SCHEDULE, **cache: Any) -> nn.Module:
    return dqar_fx.optimize(model, schedule, cache=CacheConfig(dtype="native", **cache), backend="eager")


def counted(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """What a call gives, and how many products it computes."""
    with CountsProducts() as counter:
        result = model(*args, **kwargs)
    return result, counter.products


@pytest.mark.filterwarnings("ignore")  # of what diffusers will change some day
@pytest.mark.parametrize("name", PROJECTIONS)
def test_models_of_diffusers_project_their_prompt_once(name: str) -> None:
    case = CASES[name]
    eager = build(case)
    model = build(case)
    inputs = case.inputs(torch.Generator().manual_seed(1))
    optimized(model)
    runtime = dqar_fx.runtime(model)
    saved = []
    with runtime.generation(STEPS):
        for step in range(STEPS):
            runtime.begin_step(step)
            latents, time = inputs["hidden_states"] * (1 + 0.05 * step), inputs[case.timestep] // (step + 1)
            call = {**inputs, "hidden_states": latents, case.timestep: time, "return_dict": False}
            (expected, *_), products = counted(eager, **call)
            (found, *_), computed = counted(model, **call)
            assert torch.equal(found, expected) == (step != REUSED), step
            saved.append(products - computed)
        report = runtime.report().to_dict()["hoisted"]
        assert report["bytes"] > 0
    assert saved[0] == 0
    assert saved[1:REUSED] + saved[REUSED + 1 :] == [PROJECTIONS[name]] * (STEPS - 2)
    assert saved[REUSED] > PROJECTIONS[name]
    assert report["values"] > 0
    assert 0 < report["flop_share"] < 1
    assert 0 < report["weight_share"] < 1
    assert "computed once" in str(runtime.report())


# -- one small model ------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Two attentions; the second is on a projected prompt, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.own, self.cross = Attention(), Cross()

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_mask: Tensor | None = None
    ) -> Tensor:
        prompt = self.project(encoder_hidden_states)
        if encoder_mask is not None:
            prompt = prompt * encoder_mask[..., None]
        x = hidden_states + self.own(hidden_states) * timestep
        return x + self.cross(x, prompt)


#: Products of a call: four in each attention, one projection fewer in the first, and the prompt's.
ALL, GIVEN = 3 + 4 + 1, 3 + 3


def pair(schedule: Schedule = SCHEDULE, model: nn.Module | None = None, **cache: Any) -> tuple[nn.Module, nn.Module]:
    """An eager model, and its copy, optimised."""
    eager, mine = (Denoiser().eval() for _ in range(2)) if model is None else (model, type(model)().eval())
    mine.load_state_dict(eager.state_dict())
    return eager, optimized(mine, schedule, **cache)


LATENTS = [tokens() for _ in range(STEPS)]


def compare(
    models: Sequence[nn.Module], step: int, prompt: Tensor, mask: Tensor | None = None, latents: Tensor | None = None
) -> int:
    """One step of both models; returns how many products the optimised one computed."""
    x = LATENTS[step] if latents is None else latents
    arguments = (x, torch.tensor(float(STEPS - step)), prompt, mask)
    expected = models[0](*arguments)
    found, products = counted(models[1], *arguments)
    assert step == REUSED or torch.equal(found, expected), step
    return products


def compared(models: Sequence[nn.Module], prompt: Tensor, **settings: Any) -> list[int]:
    return [compare(models, step, prompt, **settings) for step in range(STEPS)]


#: A whole run, one attention of which is reused.
RUN = [ALL, GIVEN, GIVEN, GIVEN - 3, GIVEN]


def test_products_are_those_of_the_latents_from_the_second_step_on() -> None:
    models = pair()
    prompt = tokens(length=4)
    for _ in range(2):  # the next generation computes its own
        assert compared(models, prompt) == RUN
    stats = dqar_fx.runtime(models[1]).stats
    assert (stats.captures, stats.reused) == (1, 1)
    kept = 2 * 4 * 2 * WIDTH * 4  # samples, tokens, keys and values, float32
    assert stats.cache_bytes == kept + 2 * 5 * WIDTH * 4  # and the stored attention


@pytest.mark.parametrize(("schedule", "lossless"), [(SCHEDULE, False), (Schedule.none(STEPS), True)])
def test_it_can_be_switched_off_and_a_baseline_computes_everything(schedule: Schedule, lossless: bool) -> None:
    models = pair(schedule, lossless=lossless)
    products = compared(models, tokens(length=4))
    assert products[:REUSED] == [ALL] * REUSED
    runtime = dqar_fx.runtime(models[1])
    assert runtime.report().to_dict()["hoisted"]["values"] == 0
    (graph,) = runtime.graphs
    run = {piece for _, _, kind in graph._programs for piece in (graph.plain if kind.name == "PLAIN" else [])}
    assert run == set(graph.plain)
    assert all(kind.name == "PLAIN" for _, _, kind in graph._programs)


@pytest.mark.parametrize("way", ["another tensor", "written into", "weights written into", "weights replaced"])
@pytest.mark.parametrize("change", [1, REUSED])
def test_a_change_in_the_middle_of_a_generation_is_computed(way: str, change: int) -> None:
    models = pair()
    prompt = tokens(length=4)
    with dqar_fx.runtime(models[1]).generation(STEPS):
        for step in range(STEPS):
            if step == change and way == "another tensor":
                prompt = prompt + 1
            elif step == change and way == "written into":
                prompt.mul_(2)
            elif step == change:
                for model in models:
                    kv = model.get_submodule("cross.kv")
                    if way == "weights written into":
                        kv.weight.add_(0.5 * torch.ones(2 * WIDTH, 1) @ torch.ones(1, WIDTH))
                    else:
                        kv.weight = nn.Parameter(kv.weight * 2)
            if way == "weights replaced" and step == change:
                compare(models, step, prompt)  # Dynamo may capture anew
            else:
                expected = GIVEN if step not in (0, change) else ALL
                assert compare(models, step, prompt) <= expected
                assert step not in (0, change) or expected == ALL


def test_a_prompt_made_anew_at_every_step_is_projected_at_every_step() -> None:
    models = pair()
    prompt = tokens(length=4)
    with dqar_fx.runtime(models[1]).generation(STEPS):
        products = [compare(models, step, prompt.clone()) for step in range(STEPS)]
    assert products == [ALL, ALL, ALL, ALL - 3, ALL]


def test_a_mask_counts_as_the_prompt_does() -> None:
    models = pair()
    prompt, mask = tokens(length=4), torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    with dqar_fx.runtime(models[1]).generation(STEPS):
        products = []
        for step in range(STEPS):
            if step == 2:
                mask[0, 2] = 0
            products.append(compare(models, step, prompt, mask))
    assert products == [ALL, GIVEN, ALL, GIVEN - 3, GIVEN]


def test_branches_keep_their_own() -> None:
    models = pair()
    prompts = {"cond": tokens(length=4), "uncond": tokens(length=4)}
    runtime = dqar_fx.runtime(models[1])
    products: dict[str, list[int]] = {name: [] for name in prompts}
    for step in range(STEPS):
        for name, prompt in prompts.items():
            with runtime.branch(name):
                products[name].append(compare(models, step, prompt))
        if step == 1:
            assert runtime.report().to_dict()["hoisted"]["bytes"] == 2 * 2 * 4 * 2 * WIDTH * 4
    assert products == {"cond": RUN, "uncond": RUN}


@pytest.mark.parametrize("same_prompt", [False, True])
def test_generations_that_take_turns_share_nothing(same_prompt: bool) -> None:
    models = pair()
    runtime = dqar_fx.runtime(models[1])
    prompt = tokens(length=4)
    prompts = [prompt, prompt if same_prompt else tokens(length=4)]
    outer = runtime.generation(STEPS)
    with outer:
        compare(models, 0, prompts[0])
        with runtime.generation(STEPS):
            assert [compare(models, step, prompts[1]) for step in range(2)] == [ALL, GIVEN]
        assert compare(models, 1, prompts[0]) == GIVEN
        prompts[0].mul_(3)
        assert compare(models, 2, prompts[0]) == ALL


def test_runs_that_take_turns_without_being_told_apart_are_right() -> None:
    models = pair()
    prompts = [tokens(length=4), tokens(length=4)]
    for step in range(STEPS):
        for prompt in prompts:
            x, time = LATENTS[step], torch.tensor(float(STEPS - step))
            assert torch.equal(models[1](x, time, prompt), models[0](x, time, prompt)) or step == REUSED


def test_threads_keep_their_own() -> None:
    models = pair()
    compared(models, tokens(length=4))  # captured and compiled
    prompts = [tokens(length=4) for _ in range(4)]

    def run(prompt: Tensor) -> bool:
        with torch.no_grad(), dqar_fx.runtime(models[1]).generation(STEPS):
            times = [torch.tensor(float(STEPS - step)) for step in range(STEPS)]
            found = [models[1](LATENTS[step], times[step], prompt) for step in range(STEPS)]
            expected = [models[0](LATENTS[step], times[step], prompt) for step in range(STEPS)]
        return all(torch.equal(a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if i != REUSED)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, prompts))


def test_another_batch_size_is_computed() -> None:
    models = pair()
    prompt = tokens(length=4)
    large = tokens(batch=3, length=4)
    with dqar_fx.runtime(models[1]).generation(STEPS):
        compare(models, 0, prompt)
        assert compare(models, 1, large, latents=tokens(batch=3)) == ALL
        assert compare(models, 2, large, latents=tokens(batch=3)) == GIVEN


def test_an_exception_on_the_way_leaves_nothing_behind() -> None:
    models = pair()
    prompt = tokens(length=4)
    runtime = dqar_fx.runtime(models[1])
    with runtime.generation(STEPS):
        compare(models, 0, prompt)
        (graph,) = runtime.graphs
        with mock.patch.object(type(graph), "sizes_of", side_effect=RuntimeError("no")), pytest.raises(RuntimeError):
            compare(models, 1, prompt)
        assert runtime.stats.cache_bytes == 0
        assert compare(models, 2, prompt) == ALL


def kept(model: nn.Module) -> list[Tensor]:
    stores = [stored.store for stored in dqar_fx.runtime(model)._generation()._stores.values()]
    return [value for store in stores if store.kept is not None for value in store.kept.values or ()]


@pytest.mark.parametrize("end", ["last step", "generation", "reset", "restore", "next run", "another prompt"])
def test_what_is_kept_is_freed(end: str) -> None:
    models = pair()
    prompt, runtime = tokens(length=4), dqar_fx.runtime(models[1])
    if end == "generation":
        with runtime.generation(STEPS):
            compare(models, 0, prompt)
            held = [weakref.ref(value) for value in kept(models[1])]
    else:
        compare(models, 0, prompt)
        held = [weakref.ref(value) for value in kept(models[1])]
        if end == "last step":
            for step in range(1, STEPS):
                compare(models, step, prompt)
        elif end == "reset":
            runtime.reset()
        elif end == "restore":
            dqar_fx.restore(models[1])
        elif end == "next run":
            compare(models, 0, prompt)
        else:
            compare(models, 1, prompt + 1)
    gc.collect()
    assert len(held) == 2
    assert [value() for value in held] == [None, None]


def test_inference_tensors_count_no_writes_so_that_nothing_is_hoisted() -> None:
    models = pair()
    with torch.inference_mode():
        prompt = tokens(length=4)
        products = []
        for step in range(STEPS):
            if step == 2:
                prompt.mul_(2)
            products.append(compare(models, step, prompt))
    assert products == [ALL, ALL, ALL, ALL - 3, ALL]


def test_in_and_out_of_inference_mode_each_computes_its_own() -> None:
    models = pair()
    prompt = tokens(length=4)
    products = []
    with dqar_fx.runtime(models[1]).generation(STEPS):
        for step in range(STEPS):
            with torch.inference_mode() if step in (1, 2) else torch.no_grad():
                products.append(compare(models, step, prompt))
    assert products == [ALL, ALL, GIVEN, ALL, GIVEN]  # each mode has a graph, and a store, of its own


class Generous(Denoiser):
    """Hands out the projected prompt."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:  # type: ignore[override]
        prompt = self.project(encoder_hidden_states)
        return super().forward(hidden_states, timestep, encoder_hidden_states), prompt


def test_the_caller_may_write_into_what_it_is_handed() -> None:
    models = pair(model=Generous().eval())
    prompt = tokens(length=4)
    for step in range(REUSED):
        arguments = (LATENTS[step], torch.tensor(float(STEPS - step)), prompt)
        for mine, theirs in zip(models[1](*arguments), models[0](*arguments), strict=True):
            assert torch.equal(mine, theirs)
            mine.fill_(torch.nan)


def test_results_that_the_next_replay_overwrites_are_copied() -> None:
    """As those of CUDA graphs are."""
    assert not Lowerer(resolve_backend("inductor")).overwrites_results
    assert Lowerer(resolve_backend("inductor", mode="reduce-overhead")).overwrites_results
    with mock.patch.object(Lowerer, "overwrites_results", True):
        models = pair()
        assert compared(models, tokens(length=4)) == RUN
    whole = torch.arange(24.0).view(2, 3, 4)
    values = [*whole.chunk(2, -1), whole[:, :1].expand(2, 5, 4)]
    copies = _copied(values)
    for value, copied in zip(values, copies, strict=True):
        assert torch.equal(value, copied)
        assert value.stride() == copied.stride()
    assert len({copied.untyped_storage().data_ptr() for copied in copies} - {whole.data_ptr()}) == 1


@pytest.mark.parametrize("device", [None, "cpu"])
def test_it_goes_with_kept_buffers_and_values_in_host_memory(device: str | None) -> None:
    with mock.patch.object(sizes, "is_apart", return_value=device == "cpu"):
        models = pair(keep_buffers=True, device=device)
        prompt = tokens(length=4)
        for _ in range(2):
            with dqar_fx.runtime(models[1]).generation(STEPS):
                assert compared(models, prompt) == RUN


def test_open_sizes_keep_what_is_of_their_own() -> None:
    eager, mine = Denoiser().eval(), Denoiser().eval()
    mine.load_state_dict(eager.state_dict())
    models = eager, dqar_fx.optimize(mine, SCHEDULE, cache=CacheConfig(dtype="native"), backend="eager", dynamic=True)
    for length in (4, 6):
        assert compared(models, tokens(length=length)) == RUN
    assert dqar_fx.runtime(models[1]).stats.captures == 1
