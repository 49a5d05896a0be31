"""What an interrupted calibration has found so far."""

from __future__ import annotations

import json
import secrets
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dqar_fx.calibration.solve import Coefficients
from dqar_fx.errors import CalibrationError

IDENTITY = "calibration.json"
#: Two runs of one seed differ by less, relative to the norm: kernels may round otherwise on another day.
SAME = 1e-3


@dataclass(frozen=True, slots=True)
class Recorded:
    """A sweep's coefficients, and the L2 norm of its final sample."""

    coefficients: Coefficients
    norm: float


class Records:
    """A folder with one file for each seed.

    Args:
        folder: is made if it is not there.
        identity: what the calibration is of. A folder that holds another one is refused.

    Raises:
        CalibrationError: the folder is another calibration's.
        OSError: it cannot be written to.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / IDENTITY
        if path.exists():
            try:
                there = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CalibrationError(
                    f"{path} cannot be read ({error}). Remove it, or give another folder."
                ) from error
            if there != dict(identity):
                raise CalibrationError(
                    f"{self._folder} holds another calibration: {there}, not {dict(identity)}. Give another folder, or "
                    f"remove this one."
                )
        else:
            write(path, lambda file: file.write_text(json.dumps(dict(identity), indent=2) + "\n", encoding="utf-8"))

    def sweep(self, seed: int) -> Recorded | None:
        """What was found with ``seed``; None if nothing was, or the file is damaged."""
        try:
            with np.load(self._path(seed), allow_pickle=False) as stored:
                return Recorded(stored["coefficients"], float(stored["norm"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def keep_sweep(self, seed: int, coefficients: Coefficients, final: Tensor) -> None:
        """Write it down; the file appears whole or not at all."""
        norm = float(final.double().norm())
        write(self._path(seed), lambda file: np.savez(file, coefficients=coefficients, norm=norm))

    def check(self, seed: int, final: Tensor) -> None:
        """Compare a sample with the one of before: another prompt or guidance is another calibration.

        Raises:
            CalibrationError: it is another one.
        """
        known = self.sweep(seed)
        norm = float(final.double().norm())
        if known is not None and abs(norm - known.norm) > SAME * known.norm:
            raise CalibrationError(
                f"{self._folder} holds the calibration of another sampler: with seed {seed} its sample had the norm "
                f"{known.norm:.6g}, now it is {norm:.6g}. Was the prompt or the guidance another? Give another folder."
            )

    def _path(self, seed: int) -> Path:
        return self._folder / f"seed-{seed}.npz"


def write(path: Path, put: Callable[[Path], Any]) -> None:
    """Let ``put`` write a file beside ``path``, and move it there: what was there before stays whole if that fails."""
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        put(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
