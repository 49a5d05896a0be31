"""What a plan may cost, or has to bring: ``psnr=30``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dqar_fx.errors import CalibrationError

#: Those that limit the error; the others ask for a saving.
ERRORS = ("psnr", "rel_error")


@dataclass(frozen=True, slots=True)
class Budget:
    """One number that the plan has to keep to.

    * ``psnr``: at least so many dB on average, of the final samples against those without reuse.
    * ``rel_error``: at most this relative L2 error, as a geometric mean.
    * ``speedup``: at least this factor, counted in FLOP.
    * ``reuse``: at least this share of all attentions.
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``"psnr=30"``, ``"rel_error=0.05"``, ``"speedup=1.3"`` or ``"reuse=0.6"``.

        Raises:
            CalibrationError: anything else, or a number that nothing can keep to.
        """
        kind, _, number = str(text).partition("=")
        kind = kind.strip()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        within = {
            "psnr": 0 < value < math.inf,
            "rel_error": 0 < value < math.inf,
            "speedup": 1 <= value < math.inf,
            "reuse": 0 < value < 1,
        }
        if not within.get(kind, False):
            raise CalibrationError(
                f"budget {text!r}: give psnr=30 (dB, at least), rel_error=0.05 (at most), speedup=1.3 (counted in "
                f"FLOP, at least 1) or reuse=0.6 (a share of all attentions, above 0 and below 1)."
            )
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"
