"""Whether the torch that is installed is one that this library works with; asked before anything else is imported."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

#: The oldest whose Dynamo and Inductor do what the pass relies on; pip is told the same in pyproject.toml.
OLDEST_TORCH = "2.11"


def is_older(version: str, than: str) -> bool:
    """True if torch ``version`` comes before ``than``. A preview such as 2.11.0a0 has what 2.11 has, and does not."""
    return bool(TorchVersion(version.partition("a")[0].partition("+")[0]) < than)


def check_torch(version: str = torch.__version__) -> None:
    """Refuse a torch that is too old, by its ``version``.

    Raises:
        ImportError: it is older than ``OLDEST_TORCH``.
    """
    if is_older(version, OLDEST_TORCH):
        raise ImportError(
            f"dqar_fx needs torch {OLDEST_TORCH} or newer, and torch {version} is installed. Upgrade it (pip install "
            f"--upgrade torch), or install dqar_fx in an environment of its own."
        )
