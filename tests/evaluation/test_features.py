"""Features of digits, and what happens where those of InceptionV3, LPIPS or CLIP cannot be had."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dqar_fx import digits
from dqar_fx.errors import MetricError
from dqar_fx.evaluation import digits_classifier, features, frechet_distance, perceptual

CPU = torch.device("cpu")
ASSETS = Path(digits.__file__).parent / "assets"


def test_the_classifier_is_as_good_as_its_record_says() -> None:
    record = json.loads((ASSETS / digits_classifier.RECORD).read_text(encoding="utf-8"))
    images, classes = digits.real_digits()
    right = digits_classifier.load()(images).argmax(1) == classes
    assert len(right[::5]) == record["held_out_images"] == 360
    assert float(right[::5].float().mean()) == pytest.approx(record["held_out_accuracy"], abs=0.003)
    assert record["held_out_accuracy"] > 0.97


def test_features_are_the_same_every_time_and_leave_the_random_state_alone() -> None:
    images, _ = digits.real_digits()
    state = torch.get_rng_state()
    first, second = (features.digits_features()((images[:100] + 1) / 2) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (100, 32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first[:7], features.digits_features()((images[:7] + 1) / 2))  # not by batch


def test_the_distance_of_digits_grows_with_what_is_wrong() -> None:
    images, classes = digits.real_digits()
    measure = features.digits_features()
    images = (images + 1) / 2
    real, other = measure(images[::2]), images[1::2]
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    found = [frechet_distance(measure((other + sigma * noise).clamp(0, 1)), real) for sigma in (0, 0.1, 0.2, 0.4)]
    assert found == sorted(found)
    assert found[-1] > 3 * found[0]
    assert frechet_distance(measure(images[classes != 3]), measure(images)) > 1  # a class that is never drawn


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(MetricError, match=r"features of digits want \[N, 1, 8, 8\]"):
        features.digits_features()(torch.zeros(2, 3, 8, 8))


def test_the_training_writes_what_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "train_digits_classifier.py"
    specification = importlib.util.spec_from_file_location("train_digits_classifier", path)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    script.main(["--out", str(tmp_path), "--epochs", "2"])
    record = json.loads((tmp_path / digits_classifier.RECORD).read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == record
    assert 0.5 < record["held_out_accuracy"] < 1  # two epochs learn something
    weights = load_file(tmp_path / digits_classifier.WEIGHTS)
    for name, value in digits_classifier.load(tmp_path).state_dict().items():
        assert torch.equal(value, weights[name].float())


@pytest.mark.parametrize(
    ("module", "make", "what"),
    [
        ("torchmetrics.image.fid", lambda: features.inception_features(CPU), "InceptionV3's features"),
        ("torchmetrics.image.lpip", lambda: perceptual.lpips(CPU, (64, 64)), "LPIPS"),
        ("transformers", lambda: perceptual.clip_score(CPU), "the CLIP score"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    module: str, make: object, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert callable(make)
    with pytest.raises(MetricError, match=rf"{what} cannot be measured.*pip install 'dqar-fx\[evaluate\]'"):
        make()


def test_weights_that_cannot_be_had_are_said_to_be() -> None:
    def fail() -> None:
        raise OSError("no\nnetwork")

    with pytest.raises(MetricError, match=r"X cannot be measured \(OSError: no network\).*caches of torch.hub"):
        features.made("X", fail)


def test_lpips_wants_images_that_its_network_can_see() -> None:
    with pytest.raises(MetricError, match="at least 64 x 64 pixels, and the images have 8 x 8"):
        perceptual.lpips(CPU, (8, 8))


class Double(torch.nn.Module):
    """In place of torchmetrics' networks, whose weights are not here: shows what they are given."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    @property
    def inception(self) -> Double:
        return self

    def forward(self, *images: Tensor) -> Tensor:
        self.seen += [(each.dtype, tuple(each.shape)) for each in images]
        if len(images) == 1:
            return images[0].float().flatten(1)[:, :4]
        return (images[0] - images[1]).abs().mean()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> list[Double]:
    made: list[Double] = []

    def make(**options: object) -> Double:
        made.append(Double(**options))
        return made[-1]

    for name, attribute in (("fid", "FrechetInceptionDistance"), ("lpip", "LearnedPerceptualImagePatchSimilarity")):
        module = ModuleType(f"torchmetrics.image.{name}")
        vars(module)[attribute] = make
        monkeypatch.setitem(sys.modules, f"torchmetrics.image.{name}", module)
    monkeypatch.setitem(sys.modules, "torchmetrics", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchmetrics.image", SimpleNamespace())
    return made


def test_inception_sees_bytes_in_three_channels(double: list[Double]) -> None:
    images = torch.full((70, 1, 8, 8), 0.5)
    found = features.inception_features(CPU)(images)
    assert double[0].options == {"feature": 2048}
    assert double[0].seen == [(torch.uint8, (64, 3, 8, 8)), (torch.uint8, (6, 3, 8, 8))]
    assert torch.equal(found, torch.full((70, 4), 128.0))


def test_lpips_is_of_each_image(double: list[Double]) -> None:
    images = torch.linspace(0, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 64, 64)
    found = perceptual.lpips(CPU, (64, 64))(images, torch.zeros(3, 1, 64, 64))
    assert found.tolist() == [0, 0.5, 1]
    assert double[0].options == {"net_type": "alex", "normalize": True}
    assert set(double[0].seen) == {(torch.float32, (1, 3, 64, 64))}
