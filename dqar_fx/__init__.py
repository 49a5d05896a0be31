"""Attention reuse across denoising steps as a ``torch.compile`` pass (DQAR), for diffusion transformers.

model = dqar_fx.optimize(pipe.transformer, dqar_fx.Schedule.taper(50), scheduler=pipe.scheduler)
"""

import importlib
from types import ModuleType

from dqar_fx import supported

supported.check_torch()  # before what an older torch would fail in

from dqar_fx import metrics
from dqar_fx.balance import Balance
from dqar_fx.balance_calibration import calibrate_balance
from dqar_fx.calibration.calibrate import calibrate
from dqar_fx.config import CacheConfig
from dqar_fx.controller import Controller
from dqar_fx.errors import (
    CacheError,
    CalibrationError,
    CaptureError,
    DqarError,
    ExportError,
    GateError,
    MetricError,
    PlanError,
    PolicyError,
    RuntimeStateError,
    SavedError,
    ScheduleError,
    TuningError,
)
from dqar_fx.export import export
from dqar_fx.gates import ChangeGate, CrossBranch, EntropyGate, Gates, SnrGate
from dqar_fx.graph.sites import Site
from dqar_fx.optimize import optimize, restore, runtime
from dqar_fx.plan import Plan
from dqar_fx.policy import Policy
from dqar_fx.presets import preset
from dqar_fx.quantize import dequantize, quantize
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.saved import load_compiled, save_compiled
from dqar_fx.schedule import Schedule
from dqar_fx.tune import tune
from dqar_fx.tuning.result import Tuning

__version__ = "0.1.0"

__all__ = [
    "Balance",
    "CacheConfig",
    "CacheError",
    "CalibrationError",
    "CaptureError",
    "ChangeGate",
    "Controller",
    "CrossBranch",
    "DqarError",
    "EntropyGate",
    "ExportError",
    "GateError",
    "Gates",
    "MetricError",
    "Plan",
    "PlanError",
    "Policy",
    "PolicyError",
    "Runtime",
    "RuntimeStateError",
    "SavedError",
    "Schedule",
    "ScheduleError",
    "Site",
    "SnrGate",
    "Tuning",
    "TuningError",
    "calibrate",
    "calibrate_balance",
    "dequantize",
    "export",
    "load_compiled",
    "metrics",
    "optimize",
    "preset",
    "quantize",
    "restore",
    "runtime",
    "save_compiled",
    "tune",
]


def __getattr__(name: str) -> ModuleType:
    """``dqar_fx.digits`` on first use: only the demo and who wants a trained model need it."""
    if name == "digits":
        return importlib.import_module("dqar_fx.digits")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
