"""What the commands that draw images share: their options, and models that can be drawn with."""

from __future__ import annotations

import argparse
import copy
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqar_fx.errors import DqarError
from dqar_fx.plan import Plan
from dqar_fx.schedule import Schedule

if TYPE_CHECKING:
    import torch
    from diffusers import DiTPipeline
    from torch import Tensor, nn

DIGITS = "digits"
SCHEDULE = "taper"
# A golden retriever, a red panda, a macaw and a geyser: ImageNet classes that DiT draws well.
IMAGENET_CLASSES = (207, 387, 88, 974)
MAX_REASON = 240  # characters; some errors of the hub's client are pages long


class CommandError(DqarError, ValueError):
    """What was asked for on the command line cannot be done; the message says why and what to do."""


class Painter(ABC):
    """A model and what it takes to draw with it."""

    name: str
    num_classes: int
    classes: tuple[int, ...]  # drawn if the user names none
    guidance: float  # if the user gives none
    grey: bool  # one channel, ink on paper
    size: int  # height and width of an image, in pixels

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The module that is called at every step: what is compiled or optimised."""

    @property
    @abstractmethod
    def scheduler(self) -> Any:
        """The diffusers scheduler that makes the steps."""

    @abstractmethod
    def draw(
        self, classes: Sequence[int], *, seed: int, num_steps: int, guidance: float, on_step: Callable[[], None]
    ) -> Tensor:
        """One image per class, float32 ``[N, C, H, W]`` in [0, 1] on the CPU; ``on_step`` is called after each step."""

    @abstractmethod
    def class_name(self, label: int) -> str:
        """What a prompt calls a class.

        Raises:
            CommandError: nobody knows.
        """

    @abstractmethod
    def twin(self) -> Painter:
        """The same model as another module, not compiled, that shares the weights; and a scheduler of its own."""


def add_model_arguments(
    parser: argparse.ArgumentParser, *, schedule: str = SCHEDULE, seeds: str = "", several: bool = False
) -> None:
    """The options that say what is drawn, and how.

    Args:
        parser: of the command.
        schedule: the default one.
        seeds: several seeds, and these by default; "" for a single one.
        several: lists of schedules and caches, None by default.
    """
    again: dict[str, Any] = {"action": "append"} if several else {}
    more = "; may be given several times" if several else ""
    parser.add_argument(
        "--model",
        default=DIGITS,
        metavar="MODEL",
        help=f"{DIGITS!r} (ships with the package, no download; the default), a DiT pipeline on the Hugging Face hub, "
        f"such as facebook/DiT-XL-2-256, or a folder with one",
    )
    parser.add_argument("--classes", metavar="N,N,...", help="what to draw; by default a choice that suits the model")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the schedule's, 50)")
    parser.add_argument("--guidance", type=float, metavar="W", help="scale of classifier-free guidance; 1 is without")
    if seeds:
        parser.add_argument("--seeds", default=seeds, metavar="N,N,...", help=f"of the noise (default: {seeds})")
    else:
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    parser.add_argument(
        "--schedule",
        default=None if several else schedule,
        metavar="TEXT",
        help=f"which attention reuses when, as text or as a plan saved in a .json file{more} (default: {schedule})",
        **again,
    )
    parser.add_argument(
        "--cache",
        default=None if several else "int8",
        metavar="TEXT",
        help=f"how stored values look: int8, native, int8:channel, ...{more} (default: int8)",
        **again,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument(
        "--backend",
        choices=("inductor", "eager"),
        default="inductor",
        help="what graphs are compiled with; eager is for a machine without a C++ compiler, and gains little",
    )


def parse_schedule(text: str, steps: int | None) -> Schedule | Plan:
    """The schedule that was asked for, for ``steps`` if they were given.

    Raises:
        DqarError: the text or the file cannot be understood, or does not fit ``steps``.
        OSError: the file cannot be opened.
    """
    if not text.endswith(".json"):
        schedule = Schedule.parse(text)
        return schedule if steps is None else schedule.with_steps(steps)
    plan = Plan.load(text)
    return plan.plan(plan.num_sites, steps)


def parse_classes(text: str | None, painter: Painter) -> list[int]:
    """The classes that were asked for, or the model's own choice.

    Raises:
        CommandError: not numbers, none, or none that the model knows.
    """
    if text is None:
        return list(painter.classes)
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise CommandError(f"--classes {text}: give class numbers, separated by commas, as in 3,1,4.") from error
    for label in classes:
        if not 0 <= label < painter.num_classes:
            raise CommandError(
                f"--classes {text}: {label} is out of range. Classes go from 0 to {painter.num_classes - 1}."
            )
    return classes


def parse_seeds(text: str) -> list[int]:
    """The seeds that were asked for, each once.

    Raises:
        CommandError: not numbers, a negative one, or none.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise CommandError(f"--seeds {text}: give numbers, separated by commas, as in 0,1,2.") from error
    if min(seeds) < 0:
        raise CommandError(f"--seeds {text}: give numbers of at least 0.")
    return list(dict.fromkeys(seeds))


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is loaded."""
    if args.steps is not None and args.steps < 1:
        raise CommandError(f"--steps {args.steps}: give at least 1.")
    if args.guidance is not None and not 0 <= args.guidance < float("inf"):
        raise CommandError(f"--guidance {args.guidance}: give 0 or more; 1 is without guidance.")


def pick_device(name: str) -> torch.device:
    """The device for ``auto``, or the one that was asked for.

    Raises:
        CommandError: it is not there.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        usable = ", ".join(device for device, available in there.items() if available)
        raise CommandError(f"--device {name}: torch {torch.__version__} finds none. Usable here: {usable}.")
    return torch.device(name)


def load(model: str, device: torch.device) -> Painter:
    """The model of that name.

    Raises:
        CommandError: there is no such model, or it cannot be loaded.
    """
    if model == DIGITS:
        return Digits(device)
    if not Path(model).is_dir() and model.count("/") != 1:
        raise CommandError(
            f"--model {model}: there is no such folder. Give {DIGITS!r}, a folder that holds a DiT pipeline (with a "
            f"model_index.json), or the name of one on the Hugging Face hub, such as facebook/DiT-XL-2-256."
        )
    return Pipeline(load_pipeline(model, device), model)


def load_pipeline(model: str, device: torch.device, kind: Any = None, dtype: torch.dtype | None = None) -> Any:
    """A pipeline (by default a ``DiTPipeline``) from a folder or the hub; in ``dtype`` (float16) on a GPU.

    Raises:
        CommandError: it cannot be loaded; the message says why, and what to do without a network.
    """
    import torch
    from diffusers import DiTPipeline

    kind = DiTPipeline if kind is None else kind
    try:
        pipe = kind.from_pretrained(model)
    except Exception as error:  # of many kinds: no network, no access, nothing there, damaged, another pipeline
        if Path(model).is_dir():
            advice = f"The folder must hold a {kind.__name__} as its save_pretrained writes it"
        else:
            advice = (
                f"Without a network: fetch it where there is one (hf download {model} --local-dir FOLDER) and give "
                f"--model FOLDER, or leave --model out to use the digits that ship with the package"
            )
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", MAX_REASON, placeholder=" ...")
        raise CommandError(f"--model {model} cannot be loaded ({reason}). {advice}.") from error
    pipe.set_progress_bar_config(disable=True)
    # Not while loading: that argument is called torch_dtype in older versions of diffusers, and dtype in newer ones.
    return pipe.to(device, dtype or torch.float16) if device.type == "cuda" else pipe.to(device)


class Digits(Painter):
    """The digits that ship with the package."""

    name = DIGITS
    num_classes = 10
    classes = tuple(range(10))
    grey = True

    def __init__(self, device: torch.device, denoiser: nn.Module | None = None) -> None:
        from dqar_fx import digits

        self._device = device
        self._denoiser = digits.load(device) if denoiser is None else denoiser
        self._scheduler = digits.make_scheduler()
        self.guidance = digits.GUIDANCE
        self.size = digits.SIZE

    @property
    def denoiser(self) -> nn.Module:
        """The digits model."""
        return self._denoiser

    @property
    def scheduler(self) -> Any:
        """The sampler that the model was made for."""
        return self._scheduler

    def draw(
        self, classes: Sequence[int], *, seed: int, num_steps: int, guidance: float, on_step: Callable[[], None]
    ) -> Tensor:
        """One digit per class."""
        from dqar_fx import digits

        images = digits.sample(
            self._denoiser,
            classes=classes,
            seed=seed,
            num_steps=num_steps,
            guidance=guidance,
            scheduler=self._scheduler,
            callback=lambda _step, _images: on_step(),
        )
        return (images.cpu() + 1) / 2

    def class_name(self, label: int) -> str:
        """The digit itself."""
        return str(label)

    def twin(self) -> Digits:
        """Another module with the same weights."""
        return Digits(self._device, _share_weights(self._denoiser))


class Pipeline(Painter):
    """A class-conditional pipeline of diffusers."""

    num_classes = 1000  # of ImageNet; the pipeline itself takes 1000 for "no class"
    classes = IMAGENET_CLASSES
    guidance = 4.0  # DiTPipeline's own default
    grey = False

    def __init__(self, pipe: DiTPipeline, name: str) -> None:
        self.pipe = pipe
        self.name = name
        shrunk = 2 ** (len(pipe.vae.config.block_out_channels) - 1)  # by the VAE, in each direction
        self.size = pipe.transformer.config.sample_size * shrunk

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's transformer."""
        transformer: nn.Module = self.pipe.transformer
        return transformer

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler."""
        return self.pipe.scheduler

    def draw(
        self, classes: Sequence[int], *, seed: int, num_steps: int, guidance: float, on_step: Callable[[], None]
    ) -> Tensor:
        """One image per class, decoded."""
        import torch

        scheduler, step = self.pipe.scheduler, self.pipe.scheduler.step

        def step_and_tell(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            on_step()
            return result

        scheduler.step = step_and_tell  # DiTPipeline has no callback
        try:
            images = self.pipe(
                class_labels=list(classes),
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),  # on the CPU: every device starts from the same noise
                num_inference_steps=num_steps,
                output_type="np",
            ).images
        finally:
            del scheduler.step
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def class_name(self, label: int) -> str:
        """One of ImageNet's names for the class, as the pipeline carries them."""
        for name, number in self.pipe.labels.items():
            if number == label:
                return str(name)
        raise CommandError(
            f"--prompt with {{}}: the pipeline has no name for class {label}. Write it out instead of {{}}."
        )

    def twin(self) -> Pipeline:
        """Another pipeline around the same VAE and a transformer with the same weights."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        parts = {**self.pipe.components, "transformer": _share_weights(self.denoiser), "scheduler": scheduler}
        pipe = type(self.pipe)(**parts)
        pipe.set_progress_bar_config(disable=True)
        return Pipeline(pipe, self.name)


def _share_weights(model: nn.Module) -> nn.Module:
    """A copy of the module without a copy of its weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})
