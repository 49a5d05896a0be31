"""Whether the torch that is installed is one that this library works with; asked before anything else is imported."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

#: The oldest whose Dynamo and Inductor do what the pass relies on; pip is told the same in pyproject.toml.
OLDEST_TORCH = "2.11"


def check_torch(version: str = torch.__version__) -> None:
    """Refuse a torch that is too old, by its ``version``.

    Raises:
        ImportError: it is older than ``OLDEST_TORCH``.
    """
    # A version such as 2.11.0a0 comes before 2.11, and has what is needed.
    if TorchVersion(version.partition("a")[0].partition("+")[0]) < OLDEST_TORCH:
        raise ImportError(
            f"dqar_fx needs torch {OLDEST_TORCH} or newer, and torch {version} is installed. Upgrade it (pip install "
            f"--upgrade torch), or install dqar_fx in an environment of its own."
        )
