"""What ``dqar-fx evaluate`` runs: every configuration on the same seeds, and what is measured of its images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqar_fx.cli.measuring import timed_draw

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dqar_fx.cli.models import Painter
    from dqar_fx.cli.terminal import Bar
    from dqar_fx.evaluation.features import Features
    from dqar_fx.runtime.runtime import Runtime

EAGER, COMPILED = "eager", "torch.compile"
#: Leaving one group of seeds out at a time costs a Fréchet distance each: seconds where there are 2048 features.
GROUPS = 10
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(eq=False)  # each is itself only
class Configuration:
    """One way to draw, and what was measured of it.

    Attributes:
        name: for the table.
        arguments: of ``optimize``; None for the model that nothing was done to.
        painter: what draws.
        measures: per name of a measure, one value for each seed.
        features: of the images of each seed.
        reuse: of each seed, the share of attentions that were read.
        worst: smallest PSNR of an image, in dB.
        cache_bytes: stored at most, in one generation.
        peak_mib: tensors at once at most, in one generation, beside the weights.
        rounds: for each timed generation, the seconds of its steps.
        shown: images of the first seed.
    """

    name: str
    arguments: dict[str, Any] | None = None
    painter: Painter | None = None
    measures: dict[str, list[float]] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    reuse: list[float] = field(default_factory=list)
    worst: float = float("inf")
    cache_bytes: int = 0
    peak_mib: float = 0.0
    rounds: list[list[float]] = field(default_factory=list)
    shown: Tensor | None = None

    @property
    def runtime(self) -> Runtime | None:
        """The runtime of the denoiser; None where nothing was done to it."""
        import dqar_fx

        if self.arguments is None:
            return None
        assert self.painter is not None
        return dqar_fx.runtime(self.painter.denoiser)


@dataclass
class Task:
    """What every configuration draws, and with what its images are judged."""

    classes: list[int]  # of one batch
    seeds: list[int]  # one for each batch
    steps: int
    guidance: float
    device: torch.device
    features: Features | None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    clip: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    prompts: list[str] | None = None  # of one batch

    def draw(self, painter: Painter, seed: int, on_step: Callable[[], None]) -> tuple[Tensor, list[float]]:
        """One batch, and the seconds of its steps."""
        return timed_draw(
            painter, self.classes, self.device, seed=seed, num_steps=self.steps, guidance=self.guidance, on_step=on_step
        )


@dataclass
class Real:
    """Features of real images, and what they are."""

    features: Tensor
    name: str


def real_features(features: Features | None, painter: Painter, folder: Path | None, notes: list[str]) -> Real | None:
    """Features of the real images that there are; a note where there are none.

    Raises:
        CommandError: the folder has fewer than two images.
    """
    import torch

    from dqar_fx import digits
    from dqar_fx.cli.models import CommandError

    if features is None:
        return None
    if folder is None and not painter.grey:
        notes.append("No Fréchet distance to real images: give a folder of them with --real.")
        return None
    if folder is None:
        images, _ = digits.real_digits()
        return Real(features((images + 1) / 2), "scikit-learn's digits, on which the model was trained")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise CommandError(f"--real {folder}: {len(paths)} images were found (PNG, JPEG, WebP, BMP). Give at least 2.")
    size = painter.size
    found = [features(_read_image(path, size, grey=painter.grey)[None]) for path in paths]
    return Real(torch.cat(found), f"the images in {folder}, cut square and resized to {size} x {size}")


def _read_image(path: Path, size: int, *, grey: bool) -> Tensor:
    """The largest square in the middle of a picture: float32 ``[C, size, size]`` in [0, 1]."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    from dqar_fx.cli.models import CommandError

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("L" if grey else "RGB"), (size, size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:
        raise CommandError(f"--real: {path} is no image that can be read. Take it out of the folder.") from error
    pixels = np.asarray(square, dtype=np.float32) / 255
    return torch.from_numpy(pixels[None] if grey else pixels.transpose(2, 0, 1).copy())


def prepare(configurations: Sequence[Configuration], painter: Painter, backend: str) -> list[Configuration]:
    """The baseline, which no pass and no hook has touched, and the configurations, each on a model of its own."""
    import dqar_fx

    baseline = Configuration(EAGER if backend == "eager" else COMPILED, painter=painter)
    if backend != "eager":
        baseline.painter = painter.twin()
        baseline.painter.denoiser.compile(backend=backend)
    for each in configurations:
        each.painter = painter.twin()
        assert each.arguments is not None
        dqar_fx.optimize(each.painter.denoiser, **each.arguments, scheduler=each.painter.scheduler, backend=backend)
    eager = [] if backend == "eager" else [Configuration(EAGER, painter=painter)]
    return [baseline, *configurations, *eager]


def drawn(contenders: Sequence[Configuration]) -> list[Configuration]:
    """Those whose images are judged: all but an eager model beside a compiled one, which is there for its time."""
    return [each for each in contenders if each is contenders[0] or each.arguments is not None]


def count_steps(task: Task, contenders: Sequence[Configuration], rounds: int) -> int:
    """Sampling steps in all: the images, one generation more for the memory, and what is timed."""
    judged = len(drawn(contenders))
    warming = (len(contenders) - judged) if rounds else 0
    return task.steps * (judged * (len(task.seeds) + 1) + len(contenders) * rounds + warming)


def measure(task: Task, contenders: Sequence[Configuration], progress: Bar, notes: list[str]) -> None:
    """Draw every seed with every configuration, and judge its images against the baseline's."""
    references: list[Tensor] = []
    for each in drawn(contenders):
        assert each.painter is not None
        progress.tell(f"{each.name}: drawing")
        for number, seed in enumerate(task.seeds):
            images, _ = task.draw(each.painter, seed, progress.advance)
            if each is contenders[0]:
                references.append(images)
                if number == 0:
                    _add_lpips(task, images, notes)
            judge(task, each, images, references[number])
            runtime = each.runtime
            each.reuse.append(0.0 if runtime is None else runtime.stats.reuse_ratio)
            if number == 0:
                each.shown = images
        progress.tell(f"{each.name}: memory")
        _measure_memory(task, each, progress)


def _add_lpips(task: Task, images: Tensor, notes: list[str]) -> None:
    from dqar_fx.errors import MetricError
    from dqar_fx.evaluation import perceptual

    try:
        task.lpips = perceptual.lpips(task.device, (images.shape[-2], images.shape[-1]))
    except MetricError as error:
        notes.append(str(error))


def judge(task: Task, each: Configuration, images: Tensor, references: Tensor) -> None:
    """Add what can be said of one seed's images, against the baseline's, to ``each``."""
    from dqar_fx import digits, evaluation

    errors = evaluation.squared_error(images, references)
    found = {
        "psnr_db": float(evaluation.psnr(errors.mean())),
        "ssim": float(evaluation.ssim(images, references).mean()),
        "relative_l2": float(evaluation.relative_l2(images, references).mean()),
    }
    each.worst = min(each.worst, float(evaluation.psnr(errors.max())))
    if task.lpips is not None:
        found["lpips"] = float(task.lpips(images, references).mean())
    if task.clip is not None:
        assert task.prompts is not None
        found["clip_score"] = float(task.clip(images, task.prompts).mean())
    if images.shape[1:] == (1, digits.SIZE, digits.SIZE):
        found["agreement"] = digits.agreement(images * 2 - 1, task.classes)
    for name, value in found.items():
        each.measures.setdefault(name, []).append(value)
    if task.features is not None:
        each.features.append(task.features(images))


def _measure_memory(task: Task, each: Configuration, progress: Bar) -> None:
    from dqar_fx.evaluation.memory import peak_mib

    runtime, painter = each.runtime, each.painter
    assert painter is not None
    if runtime is not None:
        runtime.reset()  # or what an earlier generation has stored would not be counted

    def on_step() -> None:
        progress.advance()
        if runtime is not None:
            each.cache_bytes = max(each.cache_bytes, runtime.stats.cache_bytes)

    with _quiet_stderr():
        each.peak_mib = peak_mib(lambda: task.draw(painter, task.seeds[0], on_step), task.device)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Inside, nothing reaches the process's standard error: torch's profiler writes lines there that say nothing."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def time_steps(task: Task, contenders: Sequence[Configuration], rounds: int, progress: Bar) -> None:
    """Time generations of the first seed, of each in turn: what the machine does besides then hits all alike."""
    for each in contenders if rounds else ():
        if each not in drawn(contenders):
            assert each.painter is not None
            progress.tell(f"{each.name}: warming up")
            task.draw(each.painter, task.seeds[0], progress.advance)
    for number in range(rounds):
        progress.tell(f"timing, round {number + 1} of {rounds}")
        for each in contenders:
            assert each.painter is not None
            each.rounds.append(task.draw(each.painter, task.seeds[0], progress.advance)[1])
