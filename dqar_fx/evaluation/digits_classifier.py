"""The small convolutional classifier of digits that ships with the package: its features stand in for InceptionV3's.

``examples/train_digits_classifier.py`` made it; ``assets/digits_classifier.json`` says how, and how good it is on
digits that it has not seen.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS, RECORD = "digits_classifier.safetensors", "digits_classifier.json"
FEATURES = 32


class DigitsClassifier(nn.Module):
    """Two convolutions and two linear layers: ``[N, 1, 8, 8]`` in [-1, 1] to logits ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.third = nn.Linear(32 * 4 * 4, FEATURES)
        self.last = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, ``[N, 32]``."""
        hidden = F.gelu(self.second(F.gelu(self.first(images))))
        features: Tensor = F.gelu(self.third(hidden.flatten(1)))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]``."""
        logits: Tensor = self.last(self.features(images))
        return logits


def load(directory: str | Path | None = None) -> DigitsClassifier:
    """The trained classifier, float32, on the CPU, in eval mode and with gradients off.

    Raises:
        FileNotFoundError: the weights are not in ``directory``; by default in the package.
    """
    from safetensors.torch import load as parse_safetensors

    folder = files("dqar_fx") / "assets" if directory is None else Path(directory)
    weights = parse_safetensors((folder / WEIGHTS).read_bytes())
    with torch.random.fork_rng(devices=[]):  # the random start that is overwritten must not move the caller's seed
        model = DigitsClassifier()
    model.load_state_dict(weights)  # stored in float16, copied into float32
    return model.eval().requires_grad_(False)
