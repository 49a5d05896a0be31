"""The shipped digits model: it loads, samples reproducibly, draws what it is asked, and its training script works."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dqar_fx import digits

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "dqar_fx" / "assets"

# diffusers' sigma-based schedulers hand tensors to numpy 2 in a way that torch does not support yet.
ignore_array_copy = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains little from a second thread, and next to another job waits long for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> diffusers.DiTTransformer2DModel:
    return digits.load()


def draw(model: nn.Module, **options: object) -> Tensor:
    """Four digits in a few steps."""
    return digits.sample(model, **({"classes": [3, 1, 4, 1], "seed": 7, "num_steps": 4} | options))


class Calls(nn.Module):
    """Stands for the model, predicts no noise, and notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.eval()

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> object:
        self.seen.append((x, timestep, class_labels))
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=torch.zeros_like(x))


def test_the_shipped_model_loads_frozen_and_finite(model: diffusers.DiTTransformer2DModel) -> None:
    assert isinstance(model, diffusers.DiTTransformer2DModel)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        assert parameter.isfinite().all()


def test_the_model_loads_in_another_dtype() -> None:
    assert {parameter.dtype for parameter in digits.load(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    digits.load()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shipped_file_is_small() -> None:
    assert (ASSETS / digits.WEIGHTS).stat().st_size <= 6_000_000


def test_the_default_guidance_is_the_one_that_was_measured() -> None:
    config = json.loads((ASSETS / digits.CONFIG).read_text())
    rows = {row["guidance"]: row for row in config["measured"]["rows"]}
    assert config["guidance"] == digits.GUIDANCE
    assert inspect.signature(digits.sample).parameters["guidance"].default == digits.GUIDANCE
    assert rows[digits.GUIDANCE]["agreement"] >= 0.95


def test_missing_weights_are_named_with_the_way_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"digits_dit\.json is missing; run examples/train_digits\.py --out"):
        digits.load(directory=tmp_path)


def test_the_digits_are_the_ones_asked_for(model: diffusers.DiTTransformer2DModel) -> None:
    classes = [i % 10 for i in range(100)]
    assert digits.agreement(digits.sample(model, classes=classes, seed=0), classes) >= 0.95


def test_strong_guidance_does_not_ruin_the_digits(model: diffusers.DiTTransformer2DModel) -> None:
    """With DDIM's ``clip_sample`` hardly any was legible at a guidance of 4."""
    images = digits.sample(model, classes=range(10), seed=0, num_steps=25, guidance=4)
    assert digits.agreement(images, range(10)) >= 0.9


def test_images_have_the_documented_shape_dtype_and_range(model: diffusers.DiTTransformer2DModel) -> None:
    images = draw(model)
    assert images.shape == (4, 1, 8, 8)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < images.max() <= 1


def test_the_seed_decides_the_images(model: diffusers.DiTTransformer2DModel) -> None:
    torch.manual_seed(0)
    first = draw(model)
    torch.manual_seed(1)  # the global generator has no say
    assert torch.equal(draw(model), first)
    assert not torch.allclose(draw(model, seed=8), first)


def test_guidance_changes_the_images(model: diffusers.DiTTransformer2DModel) -> None:
    assert not torch.allclose(draw(model, guidance=1), draw(model, guidance=3), atol=0.01)


def test_guidance_of_one_is_the_limit_of_guidance_near_one(model: diffusers.DiTTransformer2DModel) -> None:
    torch.testing.assert_close(draw(model, guidance=1), draw(model, guidance=1 + 1e-6), atol=1e-4, rtol=0)


def test_guidance_of_zero_ignores_the_class(model: diffusers.DiTTransformer2DModel) -> None:
    torch.testing.assert_close(draw(model, guidance=0), draw(model, guidance=0, classes=[9] * 4), atol=1e-4, rtol=0)


def test_with_guidance_both_halves_go_through_the_model_in_one_call() -> None:
    model = Calls()
    draw(model, guidance=2, classes=[5, 6])
    assert len(model.seen) == 4
    for x, timestep, class_labels in model.seen:
        assert torch.equal(x[:2], x[2:])
        assert timestep.shape == (4,)
        assert class_labels.tolist() == [5, 6, digits.NUM_CLASSES, digits.NUM_CLASSES]


def test_without_guidance_each_image_goes_through_the_model_once() -> None:
    model = Calls()
    draw(model, guidance=1, classes=[5, 6])
    assert [class_labels.tolist() for _, _, class_labels in model.seen] == [[5, 6]] * 4


@ignore_array_copy
@pytest.mark.parametrize("sampler", [diffusers.EulerDiscreteScheduler, diffusers.DDPMScheduler])
def test_every_step_calls_the_model_with_the_same_kind_of_tensors(sampler: type) -> None:
    """Otherwise a compiled model would be captured again."""
    model = Calls()
    draw(model, scheduler=sampler.from_config(digits.make_scheduler().config))
    assert len({(x.shape, x.dtype) for x, _, _ in model.seen}) == 1
    assert {(timestep.dtype, timestep.stride()) for _, timestep, _ in model.seen} == {(torch.int64, (1,))}
    assert len({id(class_labels) for _, _, class_labels in model.seen}) == 1


def test_a_model_compiled_in_place_draws_the_same_and_is_captured_once() -> None:
    captures = 0

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal captures
        captures += 1
        return gm

    model = digits.load()
    expected = draw(model)
    model.compile(backend=backend, fullgraph=True)
    assert torch.equal(draw(model), expected)
    assert captures == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        draw(model, seed=8, num_steps=5)


@ignore_array_copy
@pytest.mark.parametrize(
    "sampler",
    [diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler],
)
def test_other_schedulers_draw_the_digits_too(sampler: type, model: diffusers.DiTTransformer2DModel) -> None:
    scheduler = sampler.from_config(digits.make_scheduler().config)
    images = digits.sample(model, classes=range(10), seed=0, num_steps=20, scheduler=scheduler)
    assert digits.agreement(images, range(10)) >= 0.9


@ignore_array_copy
@pytest.mark.parametrize("sampler", [diffusers.DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_the_seed_decides_the_noise_that_a_scheduler_adds(
    sampler: type, model: diffusers.DiTTransformer2DModel
) -> None:
    scheduler = sampler.from_config(digits.make_scheduler().config)
    first = draw(model, scheduler=scheduler)
    assert torch.equal(draw(model, scheduler=scheduler), first)
    assert not torch.allclose(draw(model, scheduler=scheduler, seed=8), first)


def test_the_callback_sees_every_step(model: diffusers.DiTTransformer2DModel) -> None:
    seen: list[tuple[int, Tensor]] = []
    images = draw(model, callback=lambda step, images: seen.append((step, images)))
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1].clamp(-1, 1), images)


def test_progress_is_shown_only_on_request(
    model: diffusers.DiTTransformer2DModel, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(model)
    assert capsys.readouterr().out == ""
    draw(model, progress=True)
    assert "sampling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "is empty"),
        ({"classes": [3, 10]}, "10 at position 1. Classes go from 0 to 9"),
        ({"classes": [-1]}, "-1 at position 0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1001}, "Give 1 to 1000"),
        ({"guidance": -1.0}, "guidance=-1"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"scheduler": diffusers.DDIMScheduler(prediction_type="v_prediction")}, "'v_prediction'"),
        ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "prediction_type None"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(options: dict[str, object], message: str) -> None:
    model = Calls()
    with pytest.raises(ValueError, match=message):
        draw(model, **options)
    assert model.seen == []


def test_a_class_that_is_no_integer_is_refused() -> None:
    with pytest.raises(TypeError, match="integer"):
        draw(Calls(), classes=[3.5])


def test_a_model_in_train_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Call model\.eval\(\)"):
        draw(Calls().train())


def test_the_classifier_reads_digits_that_it_was_not_fitted_to() -> None:
    from sklearn.base import clone

    images, classes = digits.real_digits()
    pixels = images.flatten(1).numpy()
    fitted = clone(digits.classifier()).fit(pixels[::2], classes[::2])
    assert fitted.score(pixels[1::2], classes[1::2]) >= 0.985


def test_real_digits_agree_with_their_classes_and_not_with_others() -> None:
    images, classes = digits.real_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert digits.agreement(images, classes.tolist()) >= 0.99
    assert digits.agreement(images, ((classes + 1) % 10).tolist()) <= 0.01


def test_agreement_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="2 images for 3 classes"):
        digits.agreement(torch.zeros(2, 1, 8, 8), [1, 2, 3])
    with pytest.raises(ValueError, match=r"shape \(2, 8, 8\)"):
        digits.agreement(torch.zeros(2, 8, 8), [1, 2])


def test_a_missing_scikit_learn_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits.real_digits()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples" / "train_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_short_training_run_learns_and_writes_a_model_that_loads(script: ModuleType, tmp_path: Path) -> None:
    script.main([
        *("--out", str(tmp_path), "--steps", "30", "--batch", "32", "--log-every", "5"),
        *("--evaluate", "10", "--guidances", "1"),
    ])  # fmt: skip
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.02
    assert {path.name for path in tmp_path.iterdir()} == {digits.WEIGHTS, digits.CONFIG, "log.jsonl"}
    assert draw(digits.load(directory=tmp_path)).isfinite().all()
    config = json.loads((tmp_path / digits.CONFIG).read_text())
    assert config["training"]["steps"] == 30
    assert [row["guidance"] for row in config["measured"]["rows"]] == [1]


def test_an_interrupted_run_resumes_to_the_same_weights(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--steps", "4", "--batch", "8", "--save-every", "2", "--evaluate", "0"]
    # The learning rate follows the clock as well; for equal weights it must not.
    monkeypatch.setattr(script, "learning_rate", lambda peak, *_: peak)
    script.main(["--out", str(whole), *options])

    def interrupt(average: nn.Module, model: nn.Module, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        update(average, model, step)

    update = script.update_average
    with monkeypatch.context() as patch:
        patch.setattr(script, "update_average", interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.main(["--out", str(cut), *options])
    script.main(["--out", str(cut), *options, "--resume"])
    expected, resumed = digits.load(directory=whole).state_dict(), digits.load(directory=cut).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-3, rtol=0)


def test_augmented_digits_still_read_as_themselves(script: ModuleType) -> None:
    images, classes = digits.real_digits()
    moved = script.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert (moved.min(), moved.max()) == (-1, 1)
    assert digits.agreement(moved, classes.tolist()) >= 0.95


def test_labels_are_dropped_once_per_image(script: ModuleType) -> None:
    """diffusers drops them in every block on its own, which leaves the null class untrained."""
    assert not script.new_model().training


@pytest.mark.parametrize("option", [["--steps", "0"], ["--minutes", "-1"], ["--save-every", "0"]])
def test_the_script_refuses_numbers_that_make_no_sense(
    script: ModuleType, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(option)
    assert "give a number above 0" in capsys.readouterr().err
