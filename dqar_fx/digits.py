"""A small, trained diffusion transformer of handwritten digits that ships with the package.

A real model for demos, tests and benchmarks that need one without a download: a class-conditional DiT (Peebles & Xie
2023, arXiv:2212.09748) that draws 8 x 8 grey digits in pixel space. ``examples/train_digits.py`` made it, from the
digits that scikit-learn carries; ``assets/digits_dit.json`` has its config, its recipe and how good it was found to be.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

SIZE = 8  # height and width of an image, in pixels
NUM_CLASSES = 10  # also the index of the null class, which stands for "no class given"
GREY_LEVELS = 16  # the data's pixels are integers from 0 to this
# The default: of 1, 1.5, 2, 3 and 4 the one whose 500 images come closest to the real digits, and every one of them is
# read as asked. At 1 a few are not, above 2 they get visibly more alike (the numbers are in assets/digits_dit.json).
GUIDANCE = 1.5
WEIGHTS = "digits_dit.safetensors"
CONFIG = "digits_dit.json"


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, directory: str | Path | None = None
) -> DiTTransformer2DModel:
    """The trained model, in eval mode and with gradients off.

    Args:
        device: Where to put it.
        dtype: What to compute in. The weights are stored in float16.
        directory: A folder that ``examples/train_digits.py`` wrote; by default the model that ships.

    Returns:
        A ``DiTTransformer2DModel`` that maps ``x [N, 1, 8, 8]``, ``timestep`` int64 ``[N]`` from 0 to 999 and
        ``class_labels`` int64 ``[N]`` from 0 to 10 (10: no class) to the predicted noise, shaped as ``x``.

    Raises:
        FileNotFoundError: The weights or their config are not there.
    """
    from diffusers import DiTTransformer2DModel
    from safetensors.torch import load as parse_safetensors

    folder = files("dqar_fx") / "assets" if directory is None else Path(directory)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = parse_safetensors((folder / WEIGHTS).read_bytes())
    except FileNotFoundError as error:
        advice = "reinstall dqar-fx" if directory is None else f"run examples/train_digits.py --out {directory}"
        raise FileNotFoundError(
            f"dqar_fx.digits.load needs {WEIGHTS} and {CONFIG} in {folder}, but {error.filename} is missing; {advice}."
        ) from error
    with torch.random.fork_rng(devices=[]):  # the random start that is overwritten must not move the caller's seed
        model = DiTTransformer2DModel(**config["model"])
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    # diffusers' own ``to`` warns of modules to be kept in float32, also where, as here, there are none.
    nn.Module.to(model, device=device, dtype=dtype)
    return model


def make_scheduler() -> DDIMScheduler:
    """A fresh DDIM scheduler (Song et al. 2021, arXiv:2010.02502) with the noise levels that the model learned.

    Another sampler takes over the levels with ``Sampler.from_config(make_scheduler().config)``.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",  # these four are what the model was trained with
        # diffusers' DDIM clips the predicted image but keeps the predicted noise that no longer goes with it. Guidance
        # overshoots at many steps, the error adds up, and at a guidance of 4 hardly a digit can be read.
        clip_sample=False,
        timestep_spacing="trailing",  # starts at timestep 999, which is the pure noise that sampling starts from
    )


@torch.no_grad()  # rather than inference_mode, whose tensors Dynamo guards on and autograd refuses later
def sample(
    model: nn.Module,
    *,
    classes: Sequence[int],
    seed: int,
    num_steps: int = 50,
    guidance: float = GUIDANCE,
    scheduler: Any = None,
    progress: bool = False,
    callback: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Draw one digit per entry of ``classes``.

    With classifier-free guidance ``w`` (Ho & Salimans 2022, arXiv:2207.12598) the noise is taken to be
    ``eps(null) + w * (eps(class) - eps(null))``; both halves go through the model in one call. At ``w = 1`` that is
    ``eps(class)`` and the model sees each image once.

    Args:
        model: From ``load``, eager or compiled. It is called as ``model(x, timestep=t, class_labels=y)`` with tensors
            of the same shapes, dtypes and device at every step, so a compiled one is captured once.
        classes: What to draw, each from 0 to 9.
        seed: Of the noise, which is drawn on the CPU: every device starts from the same.
        num_steps: Steps of the scheduler, from 1 to the number it was trained with.
        guidance: ``w``, 0 or more. Above 1 the digits get clearer and more alike.
        scheduler: Any diffusers scheduler for a model that predicts the noise; by default ``make_scheduler()``.
            Its position is moved, as by any diffusers pipeline.
        progress: Show a progress bar.
        callback: Called after each step with the step's index and the images so far, float32 ``[N, 1, 8, 8]``, not yet
            limited to [-1, 1].

    Returns:
        Images, float32 ``[N, 1, 8, 8]`` in [-1, 1] (-1: background), on the model's device.

    Raises:
        ValueError: No class or one outside 0 to 9, ``num_steps`` or ``guidance`` out of range, a model in train mode
            (diffusers then drops class labels at random) or a scheduler for models that predict something else.
        TypeError: A class or ``num_steps`` that is no integer.
    """
    if scheduler is None:
        scheduler = make_scheduler()
    labels = [operator.index(label) for label in classes]
    _check(model, labels, operator.index(num_steps), guidance, scheduler)

    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 1, SIZE, SIZE, generator=generator)
    # The timesteps stay on the CPU, where the scheduler indexes with them: reading one back from a GPU waits for it.
    scheduler.set_timesteps(num_steps)
    # Schedulers such as Euler's may give fractions; rounded, the model always gets the dtype it was captured with.
    timesteps = scheduler.timesteps.round().long().to(device)
    guided = guidance != 1
    class_labels = torch.tensor(labels + [NUM_CLASSES] * len(labels) if guided else labels, device=device)
    # Samplers that add noise of their own must draw it from the seed too.
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

    images: Tensor = (noise * scheduler.init_noise_sigma).to(device)
    for step, timestep in enumerate(_track(scheduler.timesteps) if progress else scheduler.timesteps):
        # The images stay in float32; a model in half precision then costs its own error only.
        x = scheduler.scale_model_input(images, timestep).to(dtype)
        x = torch.cat([x, x]) if guided else x
        eps = model(x, timestep=timesteps[step].repeat(len(x)), class_labels=class_labels).sample.float()
        if guided:
            conditional, null = eps.chunk(2)
            eps = null + guidance * (conditional - null)
        images = scheduler.step(eps, timestep, images, **options).prev_sample
        if callback is not None:
            callback(step, images)
    return images.clamp(-1, 1)  # schedulers that do not clip by themselves overshoot a little


def _check(model: nn.Module, labels: list[int], num_steps: int, guidance: float, scheduler: Any) -> None:
    """Everything that can be known to be wrong before the first step."""
    if not labels:
        raise ValueError("sample(classes=...) is empty. Give one class, from 0 to 9, per image.")
    for position, label in enumerate(labels):
        if not 0 <= label < NUM_CLASSES:
            raise ValueError(f"sample(classes=...) has {label} at position {position}. Classes go from 0 to 9.")
    limit = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= limit:
        raise ValueError(f"sample(num_steps={num_steps}) is out of range. Give 1 to {limit}, what the scheduler has.")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"sample(guidance={guidance}) is out of range. Give 0 or more; 1 is without guidance.")
    prediction = scheduler.config.get("prediction_type")
    if prediction != "epsilon":
        raise ValueError(
            f"sample(scheduler={type(scheduler).__name__}) has prediction_type {prediction!r}, but the model predicts "
            "the noise ('epsilon'). Build it with from_config(dqar_fx.digits.make_scheduler().config)."
        )
    if model.training:
        raise ValueError("sample(model) is in train mode, where labels are dropped at random. Call model.eval().")


def _track(timesteps: Tensor) -> Iterable[Tensor]:
    from rich.progress import track

    return track(timesteps, description="sampling", total=len(timesteps))


def real_digits() -> tuple[Tensor, Tensor]:
    """The images that the model was trained on: float32 ``[1797, 1, 8, 8]`` in [-1, 1], and int64 classes ``[1797]``.

    They are the test set of the UCI Optical Recognition of Handwritten Digits data, as scikit-learn ships it.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "dqar_fx.digits takes the real digits and the classifier from scikit-learn: pip install scikit-learn"
        ) from error
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / (GREY_LEVELS / 2) - 1, torch.from_numpy(data.target).long()


@functools.cache
def classifier() -> Any:
    """A scikit-learn ``SVC`` fitted to the real digits; it is right on 99 % of digits that it has not seen.

    Fitting takes a tenth of a second, once per process.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    images, classes = real_digits()
    from sklearn.svm import SVC

    # Held-out accuracy is the same to 0.1 % for any C from 1 to 100 and gamma from 0.04 to 0.1.
    return SVC(C=10, gamma=0.04).fit(images.flatten(1).numpy(), classes.numpy())


def classify(images: Tensor) -> Tensor:
    """What the classifier reads: ``[N, 1, 8, 8]`` in [-1, 1], any float dtype and device, to int64 ``[N]`` on the CPU.

    Raises:
        ValueError: ``images`` has another shape.
        ImportError: scikit-learn is not installed.
    """
    if images.ndim != 4 or images.shape[1:] != (1, SIZE, SIZE):
        raise ValueError(f"images has shape {tuple(images.shape)}. Give [N, 1, 8, 8], as sample returns them.")
    return torch.from_numpy(classifier().predict(images.detach().cpu().float().flatten(1).numpy()))


def agreement(images: Tensor, classes: Sequence[int]) -> float:
    """The share of ``images`` (``[N, 1, 8, 8]`` in [-1, 1]) that the classifier reads as asked in ``classes``, 0 to 1.

    Raises:
        ValueError: ``images`` has another shape, is empty or does not have one image per class.
        ImportError: scikit-learn is not installed.
    """
    if len(images) != len(classes) or not len(classes):
        raise ValueError(f"{len(images)} images for {len(classes)} classes. Give one class per image, at least one.")
    return float((classify(images) == torch.as_tensor(classes)).float().mean())
