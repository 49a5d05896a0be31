"""The errors of ``dqar_fx``: one family, so that ``except DqarError`` catches all that this package raises on purpose.

A message says what is wrong, where, and what to do. Errors that a caller can cause by a wrong value are ``ValueError``
as well, those that come from calling things in the wrong order are ``RuntimeError``.
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CalibrationError",
    "CaptureError",
    "DqarError",
    "ExportError",
    "GateError",
    "MetricError",
    "PlanError",
    "PolicyError",
    "RuntimeStateError",
    "SavedError",
    "ScheduleError",
    "TuningError",
]


class DqarError(Exception):
    """Base class of every error that ``dqar_fx`` raises on purpose."""


class ScheduleError(DqarError, ValueError):
    """A schedule cannot be made, parsed or planned.

    Raised for an argument out of range, an unknown name or key in :meth:`Schedule.parse`, a custom rule that fails or
    returns something other than a bool, and a custom mask that does not fit the steps or sites it is planned for.
    """


class PlanError(DqarError, ValueError):
    """A plan is inconsistent, its file is malformed, or it does not fit the run.

    Raised for a table that reuses before anything is stored, a plan file that cannot be understood, an index outside
    of the table, and a plan whose numbers of steps and sites are not those of the model and the generation.
    """


class CaptureError(DqarError, ValueError):
    """A model cannot be captured or rewritten.

    Raised for a model in which no attention is found (the message names what was looked for), for site patterns that
    match nothing, and for a graph break where ``fullgraph=True`` forbids them.
    """


class CacheError(DqarError, ValueError):
    """A cache is configured in a way that cannot work.

    Raised for an unknown target, dtype or granularity, for combinations of them that have no meaning, and for tensors
    that cannot be quantised (an integer dtype, a shape without the axis that a scale is taken over).
    """


class CalibrationError(DqarError, ValueError):
    """A plan cannot be chosen by measurement.

    Raised for a budget that has no meaning or that nothing meets (the message says the best that can be reached), for a
    sampler that cannot be differentiated, is not repeatable, or takes another number of steps than it should.
    """


class ExportError(DqarError, ValueError):
    """A model cannot be exported.

    Raised for inputs that do not fit the model, a model that is not one graph, has sizes that are found in values or
    hands back what its graph has not made, and for what a package has no place for (values in host memory, branches).
    """


class GateError(DqarError, ValueError):
    """A gate is given a limit that has no meaning, or cannot be asked in this run.

    Raised for a negative or missing number, bounds in the wrong order, and a gate on the signal-to-noise ratio where
    nothing tells what it is.
    """


class PolicyError(DqarError, ValueError):
    """A learned policy, or what it is to be learned from, cannot be used.

    Raised for a file that is damaged or is no policy, for a network whose shapes do not fit its features or that is too
    large, and for traces that are malformed, of different models, or too few to learn from.
    """


class MetricError(DqarError, ValueError):
    """A metric has no meaning for what it was given.

    Raised for queries, keys and masks whose shapes or dtypes do not fit together, for an unknown normalisation, for a
    scheduler whose timesteps are not set, and for one whose noise levels cannot be told.
    """


class TuningError(DqarError, ValueError):
    """What reuse saves cannot be measured, or was measured for something else.

    Raised for inputs that are no arguments of a call, too few rounds, a model that runs outside of its graphs, a file
    that is no tuning, and a choice of sites that was made for another model.
    """


class RuntimeStateError(DqarError, RuntimeError):
    """Something was called at the wrong time.

    Raised when the runtime is asked of a model that was never optimised, when a model is optimised twice, and when
    generations, branches or steps are begun or left in an order that has no meaning.
    """


class SavedError(DqarError, ValueError):
    """A capture cannot be saved, or a saved one cannot be used.

    Raised for a model that is not one graph of fixed sizes or depends on what means nothing in another process, and for
    a file that is damaged, is no saved capture, or was made for another model, version, device or code.
    """
