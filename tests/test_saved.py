"""Captures on disk: another process traces nothing, and nothing that has changed goes unseen."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dqar_fx
from dqar_fx import CacheConfig, SavedError, Schedule
from dqar_fx.graph.lower import Lowerer
from tests.families import DIT, FLUX
from tests.saved_elsewhere import FAMILIES, SCHEDULE, generation

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("fresh_inference")


def call_of(family: Any, batch: int = 2) -> dict[str, Tensor]:
    """The arguments of one call, as ``Family.sample`` makes it."""
    return {
        "hidden_states": family.noise(batch=batch), "timestep": family.timestep(0, batch),
        **family.conditioning(batch=batch),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved captures of a DiT and a Flux."""
    path = tmp_path_factory.mktemp("saved")
    for name, family in FAMILIES.items():
        torch._dynamo.reset()
        dqar_fx.save_compiled(family.make(), call_of(family), path / name)
    return path


def loaded(folder: Path, name: str = "dit", *, schedule: Schedule = SCHEDULE) -> Any:
    model = FAMILIES[name].optimized(schedule)
    dqar_fx.load_compiled(model, folder / name)
    counters.clear()
    return model


def traced() -> int:
    return int(counters["stats"]["unique_graphs"])


# -- what it is for ---------------------------------------------------------------------------------------------------


def test_a_second_process_traces_nothing_and_draws_the_same(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.saved_elsewhere", str(folder)], check=True, cwd=ROOT, env=environment)
    elsewhere = torch.load(folder / "result.pt")
    for name, family in FAMILIES.items():
        here = generation(family, None)
        assert here["traced"] == 1
        assert elsewhere[name]["traced"] == 0
        assert torch.equal(elsewhere[name]["samples"], here["samples"])
        assert elsewhere[name]["actions"] == here["actions"]
        assert torch.equal(elsewhere[name]["other"], here["other"])
        assert "reuse" in {action for _, _, action in here["actions"]}


def test_the_schedule_the_cache_and_the_weights_may_be_others(folder: Path) -> None:
    schedule, cache = Schedule.interval(5, every=3), CacheConfig(dtype="int8")
    expected = DIT.sample(DIT.optimized(schedule, cache=cache, seed=3))
    model = DIT.optimized(schedule, cache=cache, seed=3)
    dqar_fx.load_compiled(model, folder / "dit")
    counters.clear()
    assert torch.equal(DIT.sample(model), expected)
    assert traced() == 0


def test_what_depends_on_the_timestep_is_computed_for_all_steps_of_a_loaded_capture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lowerer, "rounds_differently", True)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    fresh, model = (DIT.optimized(SCHEDULE, scheduler=scheduler) for _ in range(2))
    dqar_fx.load_compiled(model, folder / "dit")
    conditioning = DIT.conditioning()

    def samples(called: Any) -> Tensor:
        return torch.stack(
            [called(DIT.noise(seed=i), timestep=t.repeat(2), **conditioning).sample
             for i, t in enumerate(scheduler.timesteps)]
        )  # fmt: skip

    expected = samples(fresh)
    counters.clear()
    assert torch.equal(samples(model), expected)
    assert traced() == 0
    found = dqar_fx.runtime(model).report().to_dict()["timestep_values"]
    assert found == dqar_fx.runtime(fresh).report().to_dict()["timestep_values"]
    assert found["values"] == 3  # two blocks, and the last layer


@pytest.mark.slow
def test_an_optimised_model_can_be_saved_and_goes_on(folder: Path, tmp_path: Path) -> None:
    model = DIT.optimized(SCHEDULE)
    expected = DIT.sample(model)
    dqar_fx.save_compiled(model, call_of(DIT), tmp_path / "optimised")
    assert torch.equal(DIT.sample(model), expected)
    other = DIT.optimized(SCHEDULE)
    dqar_fx.load_compiled(other, tmp_path / "optimised")
    counters.clear()
    assert torch.equal(DIT.sample(other), expected)
    assert traced() == 0


def test_no_weight_is_in_the_file(folder: Path) -> None:
    data = (folder / "dit").read_bytes()
    for parameter in DIT.make().parameters():
        assert parameter.numpy().tobytes()[:64] not in data
    shallow = {**DIT.config, "attention_head_dim": 64}
    model = DiTTransformer2DModel(**shallow).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    path = dqar_fx.save_compiled(model, call_of(DIT), folder / "wide")
    assert path.stat().st_size < 1.2 * len(data) < size


def test_other_shapes_are_captured_as_ever_and_the_saved_one_still_serves(folder: Path) -> None:
    model = loaded(folder)
    expected = DIT.sample(DIT.make(), batch=3)
    assert torch.equal(DIT.call(model, 0, batch=3), expected[0])
    assert traced() == 1
    before = traced()
    assert torch.equal(DIT.call(model, 0), DIT.call(DIT.make(), 0))
    assert traced() == before


def test_two_models_do_not_share_what_they_loaded(folder: Path) -> None:
    one, two = loaded(folder), loaded(folder)
    first = DIT.sample(one)
    assert torch.equal(DIT.sample(two), first)
    assert dqar_fx.runtime(one) is not dqar_fx.runtime(two)
    dqar_fx.restore(one)
    assert torch.equal(DIT.sample(two), first)
    assert traced() == 0


def test_a_restored_model_is_free_of_it(folder: Path) -> None:
    model = loaded(folder)
    DIT.call(model, 0)
    dqar_fx.restore(model)
    assert torch.equal(DIT.call(model, 0), DIT.call(DIT.make(), 0))


# -- never a wrong image ----------------------------------------------------------------------------------------------


class Doubling(AttnProcessor2_0):
    """A processor of other code."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


def doubled(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return 2 * output


def with_processor(model: Any) -> None:
    model.transformer_blocks[0].attn1.set_processor(Doubling())


def with_lora(model: Any) -> None:
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False))


def without_a_block(model: Any) -> None:
    model.transformer_blocks = nn.ModuleList([*model.transformer_blocks][:1])


def with_another_block(model: Any) -> None:
    torch.manual_seed(5)
    model.transformer_blocks[1].ff = copy.deepcopy(model.transformer_blocks[0].ff).apply(
        lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None
    )


def with_tied_weights(model: Any) -> None:
    model.transformer_blocks[1].attn1.to_q.weight = model.transformer_blocks[0].attn1.to_q.weight


def with_replaced_forward(model: Any) -> None:
    block = model.transformer_blocks[0].ff
    original = block.forward
    block.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)


def with_replaced_root_forward(model: Any) -> None:
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.sample = 2 * output.sample
        return output

    model.forward = forward


#: What may be done to a model. Each changes its output, but for those of _SAME.
CHANGES: dict[str, Callable[[Any], object]] = {
    "a processor": with_processor,
    "a hook on a part": lambda m: m.transformer_blocks[0].ff.register_forward_hook(doubled),
    "a pre-hook on a part": lambda m: m.transformer_blocks[0].ff.register_forward_pre_hook(lambda _, a: (2 * a[0],)),
    "a hook on the model": lambda m: m.register_forward_hook(lambda _m, _a, o: type(o)(sample=2 * o.sample)),
    "an attribute": lambda m: setattr(m.transformer_blocks[1].norm3, "eps", 0.5),
    "an attribute of a processor's module": lambda m: setattr(
        m.transformer_blocks[0].attn1, "rescale_output_factor", 2
    ),
    "another module": with_another_block,
    "a block less": without_a_block,
    "tied weights": with_tied_weights,
    "a replaced forward": with_replaced_forward,
    "the model's own forward": with_replaced_root_forward,
    "another parameter": lambda m: setattr(m.proj_out_2, "weight", nn.Parameter(2 * m.proj_out_2.weight.detach())),
    "weights in place": lambda m: m.proj_out_2.weight.mul_(2),
    "config": lambda m: m.register_to_config(patch_size=2, norm_eps=0.25),
}
#: Changes that the graph does not depend on: nothing has to be captured anew.
KEPT = frozenset({"another parameter", "weights in place", "config"})
#: Changes that leave the structure as it is.
UNTOLD = frozenset({"another parameter", "weights in place", "another module"})
#: The changes that are tried by default; the others go the same ways.
SOME = frozenset({"a processor", "a hook on a part", "an attribute", "the model's own forward", "weights in place"})
BEFORE = pytest.param("before the first call", marks=pytest.mark.slow)


@pytest.mark.parametrize("when", [BEFORE, "in a run"])
@pytest.mark.parametrize("change", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in CHANGES])
def test_a_change_after_loading_is_never_missed(folder: Path, change: str, when: str) -> None:
    eager, model = DIT.make(), loaded(folder, schedule=Schedule.none(5))
    if when == "in a run":
        assert torch.equal(DIT.call(model, 0), DIT.call(eager, 0))
        assert traced() == 0
    CHANGES[change](model)
    CHANGES[change](eager)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(DIT.call(model, 1), DIT.call(eager, 1))
    told = any("captured anew" in str(w.message) for w in said)
    assert told == (when == "before the first call" and change not in UNTOLD)
    if change in KEPT and when == "in a run":
        assert traced() == 0


@pytest.mark.parametrize("when", [BEFORE, "in a run"])
def test_lora_is_seen(folder: Path, when: str) -> None:
    eager, model = FLUX.make(), loaded(folder, "flux", schedule=Schedule.none(5))
    if when == "in a run":
        FLUX.call(model, 0)
        assert traced() == 0
    for each in (eager, model):
        with_lora(each)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loaded capture does not fit")
        assert torch.equal(FLUX.call(model, 1), FLUX.call(eager, 1))
        assert traced() > 0
        for each in (eager, model):
            each.fuse_lora()
        assert torch.equal(FLUX.call(model, 2), FLUX.call(eager, 2))


def test_what_changes_between_loading_and_the_first_call_is_told(folder: Path) -> None:
    eager, model = DIT.make(), loaded(folder)
    for each in (eager, model):
        each.transformer_blocks[1].norm3.eps = 0.5
    with pytest.warns(UserWarning, match=r"captured anew: transformer_blocks\.1\.norm3\.eps was float 1e-05"):
        assert torch.equal(DIT.call(model, 0), DIT.call(eager, 0))
    assert traced() == 1


def test_training_mode_is_seen(folder: Path) -> None:
    model = loaded(folder)
    DIT.call(model, 0)
    model.train()
    DIT.call(model, 1)
    assert traced() == 1


def test_another_dtype_is_seen(folder: Path) -> None:
    model = loaded(folder)
    DIT.call(model, 0)
    model.to(torch.bfloat16)
    expected = DIT.call(DIT.make(torch.bfloat16), 1, dtype=torch.bfloat16)
    assert torch.equal(DIT.call(model, 1, dtype=torch.bfloat16), expected)
    assert traced() == 1


def test_gradients_are_refused_as_ever(folder: Path) -> None:
    model = loaded(folder)
    DIT.call(model, 0)
    with torch.enable_grad(), pytest.raises(dqar_fx.CaptureError, match="gradients"):
        model(**call_of(DIT))


@pytest.mark.slow
def test_autocast_is_seen(folder: Path) -> None:
    model = loaded(folder)
    DIT.call(model, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DIT.call(model, 1), DIT.call(DIT.make(), 1))
    assert traced() == 1


def test_a_patched_function_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder)
    DIT.call(model, 0)
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: 2 * original(*args, **kwargs)
    )
    assert torch.equal(DIT.call(model, 1), DIT.call(DIT.make(), 1))


def test_forced_eager_is_eager(folder: Path) -> None:
    model = loaded(folder)
    DIT.call(model, 0)
    ran: list[bool] = []
    model.transformer_blocks[0].ff.net[0].proj.forward = watched(model.transformer_blocks[0].ff.net[0].proj, ran)
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="ran eager"):
        assert torch.equal(DIT.call(model, 1), DIT.call(DIT.make(), 1))
    assert ran == [True]


def watched(module: nn.Module, ran: list[bool]) -> Callable[..., Any]:
    """The module's forward, and a note whenever it runs."""
    original = module.forward

    def forward(*args: Any) -> Any:
        ran.append(True)
        return original(*args)

    return forward


# -- refused when it is loaded ----------------------------------------------------------------------------------------


def refuse(folder: Path, model: Any, message: str) -> None:
    dqar_fx.optimize(model, SCHEDULE, backend="eager")
    with pytest.raises(SavedError, match=message):
        dqar_fx.load_compiled(model, folder / "dit")


def test_another_class_is_refused(folder: Path) -> None:
    refuse(folder, FAMILIES["flux"].make(), "DiTTransformer2DModel, and does not fit this model")


def test_another_number_of_layers_is_refused(folder: Path) -> None:
    model = DiTTransformer2DModel(**{**DIT.config, "num_layers": 3}).eval()
    refuse(folder, model, r"transformer_blocks\.2.* was not there|num_layers")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.to(torch.bfloat16), "float32.* and is .*bfloat16"),
        (lambda m: m.transformer_blocks[0].ff.train(), "eval, and is .* training"),
        (lambda m: m.requires_grad_(requires_grad=False), "requires_grad"),
        (with_processor, "processor was .*AttnProcessor2_0.*Doubling"),
        (lambda m: setattr(m.transformer_blocks[1].norm3, "eps", 0.5), r"transformer_blocks\.1\.norm3\.eps was"),
        (lambda m: m.register_to_config(norm_eps=0.25), "_internal_dict was"),
        (lambda m: m.transformer_blocks[0].register_forward_hook(doubled), "has one"),
        (with_tied_weights, "which is transformer_blocks.0.attn1.to_q.weight"),
    ],
)
def test_another_structure_is_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    model = DIT.make()
    change(model)
    refuse(folder, model, message)


def test_another_device_is_refused(folder: Path) -> None:
    refuse(folder, DIT.make().to("meta"), "device was cpu, and is meta")


@pytest.mark.parametrize("name", ["torch", "python", "diffusers"])
def test_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from dqar_fx.saving import structure

    real = structure.versions
    monkeypatch.setattr(structure, "versions", lambda device: {**real(device), name: "9.9"})
    refuse(folder, DIT.make(), f"{name} was .*, and is 9.9. Save it anew")


def test_other_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dqar_fx.saving import structure

    real = structure._digest
    edited = "diffusers.models.embeddings"
    monkeypatch.setattr(structure, "_digest", lambda module: "edited" if module.__name__ == edited else real(module))
    refuse(folder, DIT.make(), f"the code of module {edited} is another now")


def test_a_patched_method_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * torch.nn.functional.linear(x, self.weight, self.bias))
    refuse(folder, DIT.make(), "torch.nn.modules.linear.Linear .* and is")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "damaged"),
        (lambda data: data[:200], "damaged"),
        (lambda data: data[:60] + b"x" + data[61:], "damaged"),
        (lambda data: b"", "no saved capture"),
        (lambda data: b"PK\x03\x04" + data, "no saved capture"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    (tmp_path / "dit").write_bytes(damage((folder / "dit").read_bytes()))
    refuse(tmp_path, DIT.make(), message)


def test_a_missing_file_is_what_it_is_anywhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dqar_fx.load_compiled(DIT.optimized(SCHEDULE), tmp_path / "none")


def test_the_order_of_things_is_refused_where_it_is_wrong(folder: Path) -> None:
    with pytest.raises(dqar_fx.RuntimeStateError, match="not optimised"):
        dqar_fx.load_compiled(DIT.make(), folder / "dit")
    model = DIT.optimized(SCHEDULE)
    DIT.call(model, 0)
    with pytest.raises(SavedError, match="captured already"):
        dqar_fx.load_compiled(model, folder / "dit")


# -- refused when it is saved -----------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A model whose forward is given."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self.linear, x)


def broken(linear: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return linear(x)


def late(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x[x[:, 0] > 0])


@pytest.mark.parametrize(
    ("forward", "message"),
    [(broken, "cannot be captured as one graph"), (late, "a size in the captured graph is open")],
)
def test_what_is_not_one_graph_of_fixed_sizes_is_not_saved(
    tmp_path: Path, forward: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(SavedError, match=message):
        dqar_fx.save_compiled(Plain(forward).eval(), (torch.randn(3, 4),), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_open_sizes_are_not_saved(tmp_path: Path) -> None:
    given = call_of(DIT)
    torch._dynamo.mark_dynamic(given["hidden_states"], 0)
    with pytest.raises(SavedError):
        dqar_fx.save_compiled(DIT.make(), given, tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"nothing": 1}, "inputs do not fit the forward of DiTTransformer2DModel"),
        ([1], "Give the arguments of one call"),
    ],
)
def test_inputs_that_are_none_are_refused(tmp_path: Path, inputs: Any, message: str) -> None:
    with pytest.raises(SavedError, match=message):
        dqar_fx.save_compiled(DIT.make(), inputs, tmp_path / "file")


def test_hooks_are_refused_when_it_is_saved(tmp_path: Path) -> None:
    model = DIT.make()
    model.transformer_blocks[0].register_forward_hook(doubled)
    with pytest.raises(SavedError, match=r"transformer_blocks\.0 .* has a hook"):
        dqar_fx.save_compiled(model, call_of(DIT), tmp_path / "file")


def test_an_older_torch_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(SavedError, match=r"torch 2\.13 or newer, and torch 2\.12\.1"):
        dqar_fx.save_compiled(DIT.make(), call_of(DIT), folder / "file")


@pytest.mark.slow
def test_compiled_by_inductor_it_draws_the_same(folder: Path) -> None:
    expected = DIT.sample(DIT.optimized(SCHEDULE, backend="inductor"))
    torch._dynamo.reset()
    model = DIT.optimized(SCHEDULE, backend="inductor")
    dqar_fx.load_compiled(model, folder / "dit")
    counters.clear()
    torch.testing.assert_close(DIT.sample(model), expected)
    assert traced() == 0
