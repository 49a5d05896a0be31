"""DQAR's ablations by name, as arguments of ``optimize``."""

from __future__ import annotations

from typing import Any

from dqar_fx.config import CacheConfig
from dqar_fx.errors import ScheduleError
from dqar_fx.gates import EntropyGate, Gates
from dqar_fx.schedule import Schedule

__all__ = ["PRESETS", "preset"]

PRESETS = ("baseline", "scheduling_only", "entropy_gate_only", "quant_cache_only", "full_dqar")
#: Steps that the entropy gate alone leaves to warm up (R12): the first two show what the entropy is.
_WARMUP = 5
#: DQAR's limits on what is stored (R14): steps, and reads.
_MAX_AGE, _MAX_REUSE = 6, 4


def preset(name: str, num_steps: int = 50) -> dict[str, Any]:
    """Arguments for ``optimize``: ``dqar_fx.optimize(model, **dqar_fx.preset("full_dqar"), scheduler=pipe.scheduler)``.

    ===================== =================================== ================= ========
    name                  schedule                            gates             cache
    ===================== =================================== ================= ========
    ``baseline``          ``none``: all compute               none              (unused)
    ``scheduling_only``   ``linear(warmup=0.2, fraction=.5)`` none              native
    ``entropy_gate_only`` ``always(warmup=5)``                entropy           native
    ``quant_cache_only``  ``always(warmup=1)``: 98 %          none              INT8
    ``full_dqar``         ``linear(warmup=0.2, fraction=.5)`` age, budget, SNR, INT8
                                                              entropy
    ===================== =================================== ================= ========

    They are DQAR's (R54), to compare with; what we recommend is ``Schedule.interval``. Without a ``scheduler`` the SNR
    gate of ``full_dqar`` is left out.

    Raises:
        ScheduleError: there is no preset of that name.
    """
    native = CacheConfig(dtype="native")
    if name == "baseline":
        return {"schedule": Schedule.none(num_steps)}
    if name == "scheduling_only":
        return {"schedule": Schedule.linear(num_steps), "cache": native}
    if name == "entropy_gate_only":
        gates = Gates(entropy=EntropyGate(), snr=None)
        return {"schedule": Schedule.always(num_steps, warmup=_WARMUP), "gates": gates, "cache": native}
    if name == "quant_cache_only":
        return {"schedule": Schedule.always(num_steps)}
    if name == "full_dqar":
        return {"schedule": Schedule.linear(num_steps), "gates": Gates(max_age=_MAX_AGE, max_reuse=_MAX_REUSE)}
    raise ScheduleError(f"there is no preset {name!r}. Use one of {', '.join(PRESETS)}.")
