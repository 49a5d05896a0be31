"""What a Fréchet distance is taken between: features of images, by the FID's InceptionV3 or a classifier of digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqar_fx import digits
from dqar_fx.errors import MetricError

EXTRA = "pip install 'dqar-fx[evaluate]'"
BATCH = 64  # images that go through a network at once
MAX_REASON = 240  # characters


@dataclass(frozen=True, slots=True)
class Features:
    """A network that turns images into features.

    Attributes:
        name: for the table.
        dimension: of the features.
        network: images ``[N, C, H, W]`` in [0, 1] on the CPU to ``[N, dimension]``.
    """

    name: str
    dimension: int
    network: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[N, dimension]`` on the CPU, of images ``[N, C, H, W]`` in [0, 1]."""
        return torch.cat([self.network(part.float().clamp(0, 1)).float().cpu() for part in torch.split(images, BATCH)])


def digits_features() -> Features:
    """Those of the small classifier that ships with the package: 32 numbers for an 8 x 8 digit."""
    from dqar_fx.evaluation import digits_classifier

    model = digits_classifier.load()

    def network(images: Tensor) -> Tensor:
        if images.shape[1:] != (1, digits.SIZE, digits.SIZE):
            raise MetricError(f"images of shape {tuple(images.shape)}: the features of digits want [N, 1, 8, 8].")
        return model.features(images * 2 - 1)

    return Features("a small classifier of digits", digits_classifier.FEATURES, network)


def inception_features(device: torch.device) -> Features:
    """The 2048 of InceptionV3's last pooling, with the weights that the FID is defined by (torch-fidelity's).

    Images of any size, grey or in colour; the network enlarges or shrinks them to 299 x 299 by itself.

    Raises:
        MetricError: torchmetrics is not installed, or the weights can neither be found nor fetched.
    """

    def make() -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048).inception

    inception = made("InceptionV3's features", make).to(device).eval()

    def network(images: Tensor) -> Tensor:
        pixels = (in_colour(images) * 255).round().to(torch.uint8)  # what the FID's network takes
        features: Tensor = inception(pixels.to(device))
        return features

    return Features("InceptionV3", 2048, network)


def made(what: str, make: Callable[[], Any]) -> Any:
    """What ``make`` makes with an optional package, or a message that says what is missing.

    Raises:
        MetricError: the package is not there or broken, or its weights cannot be had.
    """
    try:
        return make()
    except ModuleNotFoundError as error:
        raise MetricError(f"{what} cannot be measured: {error.name or error} is not installed. {EXTRA}") from error
    except Exception as error:  # no network, a damaged file, a package built for another torch
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        raise MetricError(
            f"{what} cannot be measured ({reason}). Its weights are fetched once from the internet; without one, copy "
            f"the caches of torch.hub and of the Hugging Face hub from a machine where they are."
        ) from error


def in_colour(images: Tensor) -> Tensor:
    """Grey images ``[N, 1, H, W]`` as ``[N, 3, H, W]``; others as they are."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
