"""Gates: what may block a reuse that the schedule would allow, judged at every step from what was measured before.

DQAR asks in this order: is the warm-up over, does the schedule reuse, is something stored, is it recent enough (age),
has it been read often enough (budget), is the noise level in range (SNR), is the attention concentrated enough
(entropy)? The first three belong to the schedule and the cache; the others are here, each an object that can block
alone. One of our own comes behind them: did the attention's result change much the last time it was computed? Last
comes a learned policy (policy.py).

The cheap questions come first (dqar.md, C14: SNR before entropy; the decisions are the same in either order).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Protocol

from dqar_fx.errors import GateError
from dqar_fx.policy import ENTROPY_ROWS, Judge, PolicyGate

__all__ = ["Candidate", "ChangeGate", "CrossBranch", "EntropyGate", "Gate", "Gates", "Measurement", "SnrGate"]


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:  # NaN is not
        raise GateError(f"{name} is {value!r}. Give a number of at least 0.")


def _check_count(name: str, value: object, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise GateError(f"{name} is {value!r}. Give an int of at least {least}.")


def _short(gate: Any) -> str:
    """The gate as one would write it: its first argument, and those that are not the default."""
    first, *others = (f for f in fields(gate) if f.init)
    shown = [f"{getattr(gate, first.name):g}"]
    for each in others:
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if getattr(gate, each.name) != default:
            shown.append(f"{each.name}={getattr(gate, each.name)!r}")
    return f"{type(gate).__name__}({', '.join(shown)})"


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured when a site last computed; NaN where nothing was.

    Attributes:
        entropy: of its attention, mean over rows, heads and samples; in nats a row, or as ``EntropyGate.normalize``.
        entropy_max: the largest of any sample.
        change: ``|new - stored| / |new|`` of its exits (L2), mean over samples.
        change_max: the largest of any sample.
        difference: ``|new - other| / |new|`` of its exits (L2), where ``other`` is what another branch of guidance
            stored at the same step; mean over samples.
        difference_max: the largest of any sample.
    """

    entropy: float = math.nan
    entropy_max: float = math.nan
    change: float = math.nan
    change_max: float = math.nan
    difference: float = math.nan
    difference_max: float = math.nan


NOTHING = Measurement()


@dataclass(slots=True)
class Candidate:
    """One site at one step that would reuse by the schedule, as the gates see it.

    Attributes:
        step: counted from 0.
        num_steps: of the generation.
        site: its number.
        num_sites: of the model.
        age: steps since the stored value was computed.
        reuses: how often it has been read since.
        snr: signal-to-noise ratio at this step, NaN where it is not known.
        prompt_length: tokens of the prompt, None where there is none or its length is not known.
        measured: what was measured when the site last computed, as far as it has arrived.
        entropy_bound: the largest entropy that its attention can have, ``ln(keys)``; infinity where it is not known.
        latent_norm: ``||x_t||_2`` of the model's latents, mean over samples, as far as it has arrived; NaN before.
    """

    step: int = 0
    num_steps: int = 1
    site: int = 0
    num_sites: int = 1
    age: int = 0
    reuses: int = 0
    snr: float = math.nan
    prompt_length: int | None = None
    measured: Measurement = NOTHING
    entropy_bound: float = math.inf
    latent_norm: float = math.nan


class Gate(Protocol):
    """One question. ``reason`` is the word that is recorded where it blocks."""

    @property
    def reason(self) -> str:
        """One word."""

    def allows(self, candidate: Candidate) -> bool:
        """True if the stored value may be read, as far as this gate is concerned."""


@dataclass(frozen=True, slots=True)
class AgeGate:
    """Blocks while the stored value is older than ``limit`` steps (DQAR's ``max_gap``)."""

    limit: int
    reason: str = field(default="stale", init=False)

    def __post_init__(self) -> None:
        _check_count("Gates.max_age", self.limit)

    def __str__(self) -> str:
        return f"max_age={self.limit}"

    def allows(self, candidate: Candidate) -> bool:
        """``age <= limit``."""
        return candidate.age <= self.limit


@dataclass(frozen=True, slots=True)
class BudgetGate:
    """Blocks once the stored value has been read ``limit`` times (DQAR's ``max_reuse_per_block``)."""

    limit: int
    reason: str = field(default="budget", init=False)

    def __post_init__(self) -> None:
        _check_count("Gates.max_reuse", self.limit)

    def __str__(self) -> str:
        return f"max_reuse={self.limit}"

    def allows(self, candidate: Candidate) -> bool:
        """``reuses < limit``."""
        return candidate.reuses < self.limit


@dataclass(frozen=True, slots=True)
class SnrGate:
    """Blocks where the signal-to-noise ratio is out of range, bounds inclusive (DQAR, R8 and R11).

    The ratio is that of the noise schedule (``metrics.snr``), so it is known before a generation begins.

    Args:
        low: smallest ratio at which a value may be reused.
        high: largest. DQAR's 10 shuts the last steps, where reuse is safest (dqar.md, C3); infinity by default.
        deep_snr: what the deepest third of all sites needs in addition (DQAR's ``deep_layer_snr_threshold`` is 1);
            None for nothing.

    Raises:
        GateError: a bound is negative or NaN, or ``low > high``.
    """

    low: float = 0.1
    high: float = math.inf
    deep_snr: float | None = None
    reason: str = field(default="snr", init=False)

    def __post_init__(self) -> None:
        for name in ("low", "high", "deep_snr"):
            value = getattr(self, name)
            if value is not None:
                _check_number(f"SnrGate.{name}", value)
        if self.low > self.high:
            raise GateError(f"SnrGate(low={self.low}, high={self.high}) lets nothing pass. Give low <= high.")

    def __str__(self) -> str:
        return _short(self)

    def allows(self, candidate: Candidate) -> bool:
        """``low <= snr <= high``, and ``snr >= deep_snr`` from two thirds of the depth on; not if it is unknown."""
        if not self.low <= candidate.snr <= self.high:  # NaN is in no range
            return False
        is_deep = 3 * candidate.site >= 2 * candidate.num_sites
        deep_snr = self.deep_snr if is_deep else None
        return deep_snr is None or candidate.snr >= deep_snr


@dataclass(frozen=True, slots=True)
class EntropyGate:
    """Blocks where the attention was spread too widely when it was last computed: reuse needs ``H < tau(p)``, strictly.

    DQAR, R8 and R9: ``tau(p) = threshold * sqrt(p / base_prompt_length)`` for a prompt of ``p`` tokens, at most twice
    the threshold; ``threshold`` itself where there is no prompt.

    Args:
        threshold: in nats a row, or in [0, 1] with ``normalize="keys"``.
        base_prompt_length: the prompt length at which the threshold holds as it is (77: CLIP's).
        adaptive: False for the same threshold at every prompt length.
        normalize: ``"row"``: the entropy in nats, at most ``ln(keys)``: 5.5 for 256 tokens, 8.3 for 4096, so a
            threshold does not carry over from one resolution to another. ``"keys"``: divided by that.
        rows: of each attention, how many queries are looked at inside the model (``metrics.attention_entropy``): the
            standard error of the mean is at most the rows' standard deviation over ``sqrt(rows)``, the cost
            ``rows / queries`` of another attention. None for all of them, exactly.
        site_scales: factors on the limit of single sites, by number.
        per_sample: every sample of a batch must be below the limit, not only their mean.

    Raises:
        GateError: a value out of range.
    """

    threshold: float = 2.0
    base_prompt_length: int = 77
    adaptive: bool = True
    normalize: str = "row"
    rows: int | None = 256
    site_scales: Mapping[int, float] = field(default_factory=dict, hash=False)
    per_sample: bool = False
    reason: str = field(default="entropy", init=False)

    def __post_init__(self) -> None:
        _check_number("EntropyGate.threshold", self.threshold)
        _check_count("EntropyGate.base_prompt_length", self.base_prompt_length, 1)
        if self.normalize not in ("row", "keys"):
            raise GateError(f"EntropyGate.normalize is {self.normalize!r}. Use 'row' (nats) or 'keys' (0 to 1).")
        if self.rows is not None:
            _check_count("EntropyGate.rows", self.rows, 1)
        object.__setattr__(self, "site_scales", dict(self.site_scales))  # what the caller does to theirs is not ours
        for site, scale in self.site_scales.items():
            _check_count("EntropyGate.site_scales' site", site)
            _check_number(f"EntropyGate.site_scales[{site}]", scale)

    def __str__(self) -> str:
        return _short(self)

    def limit(self, prompt_length: int | None = None) -> float:
        """``tau(p)``: what the entropy must be below, for a prompt of that many tokens (None or 0: no prompt)."""
        if prompt_length is not None:
            _check_count("prompt_length", prompt_length)
        if not prompt_length or not self.adaptive:
            return self.threshold
        return min(self.threshold * math.sqrt(prompt_length / self.base_prompt_length), 2 * self.threshold)

    def allows(self, candidate: Candidate) -> bool:
        """``H < tau(p)``; not where nothing was measured yet and the limit is one that an entropy can reach."""
        limit = self.limit(candidate.prompt_length)
        if self.site_scales:
            limit *= self.site_scales.get(candidate.site, 1.0)
        if limit > (candidate.entropy_bound if self.normalize == "row" else 1.0):
            return True
        measured = candidate.measured
        return (measured.entropy_max if self.per_sample else measured.entropy) < limit


@dataclass(frozen=True, slots=True)
class ChangeGate:
    """Blocks while a site's result, when last computed, was further than ``threshold`` from the stored one before it.

    Relative to its own size: ``|new - stored| / |new|`` over all exits. Not DQAR's: it measures what reuse would have
    cost there, where entropy only hints at it.

    Args:
        threshold: 0.1 is a tenth of the result's own size.
        per_sample: every sample of a batch must be within it, not only their mean.

    Raises:
        GateError: the threshold is negative or NaN.
    """

    threshold: float
    per_sample: bool = False
    reason: str = field(default="change", init=False)

    def __post_init__(self) -> None:
        _check_number("ChangeGate.threshold", self.threshold)

    def __str__(self) -> str:
        return _short(self)

    def allows(self, candidate: Candidate) -> bool:
        """``change <= threshold``; not where nothing was measured yet."""
        measured = candidate.measured
        return (measured.change_max if self.per_sample else measured.change) <= self.threshold


@dataclass(frozen=True, slots=True)
class CrossBranch:
    """Lets a branch of guidance take what the branch before it stored at the same step, where the two were alike.

    For guidance in two calls a step (branches "cond" and "uncond"); in one call there is nothing to take. The branch
    that is called first at a step computes and stores as ever. A later one that would compute takes its value instead,
    if their relative difference ``|own - other| / |own|`` over all exits was within ``threshold`` when both last
    computed at one step. Until the next such step it then reads that value wherever the schedule has it reuse: it is
    its own as much as one that it computed. (DiTFastAttn's sharing across guidance, Yuan et al. 2024, arXiv:2406.08552,
    by what is measured in the run instead of a calibration before it.)

    Not during the schedule's warm-up, and never what depends on the prompt alone (``Site.lossless``). A schedule that
    reuses nothing shares from its first steps.

    Args:
        threshold: 0.05 is a twentieth of the result's own size. INT8 alone makes about 0.01 (digits model, per token).
        refresh: after so many values taken, the branch computes one, and is measured anew.
        per_sample: every sample of a batch must be within the threshold, not only their mean.

    Raises:
        GateError: the threshold is negative or NaN, or ``refresh`` no int of at least 1.
    """

    threshold: float
    refresh: int = 8
    per_sample: bool = False

    def __post_init__(self) -> None:
        _check_number("CrossBranch.threshold", self.threshold)
        _check_count("CrossBranch.refresh", self.refresh, 1)

    def __str__(self) -> str:
        return _short(self)

    def allows(self, measured: Measurement) -> bool:
        """``difference <= threshold``; not where nothing was measured yet."""
        return (measured.difference_max if self.per_sample else measured.difference) <= self.threshold


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The gates that a reuse has to pass after the schedule; each that is None is left out.

    Args:
        entropy: on the attention's entropy, measured inside the compiled graph whenever the site computes.
        snr: on the noise level, which the scheduler tells (``optimize(..., scheduler=pipe.scheduler)``). The default
            one is left out where there is no scheduler; one that is given here then is an error.
        max_age: largest age of a value that is read, in steps (DQAR's ``max_gap``).
        max_reuse: how often a stored value is read before it is computed anew (DQAR: 2, 4 or 6).
        change: on how much the result changed when it was last computed.
        policy: a learned policy (``Policy.load``), asked last. What it is told of a batch is the mean over its samples.
        per_sample: entropy, change and difference must be within their limits for every sample of a batch, not only on
            average.
        cross_branch: no gate, but its counterpart: where a branch of guidance would compute, it may take the value of
            the other one.

    In an optimised model a measurement is used one step late: what step ``t`` computed decides from step ``t + 2`` on,
    so that nothing waits for the device. Where nothing is measured yet, the site computes.

    Raises:
        GateError: an argument out of range or of the wrong kind.
    """

    entropy: EntropyGate | None = EntropyGate()
    snr: SnrGate | None = SnrGate()
    max_age: int | None = None
    max_reuse: int | None = None
    change: ChangeGate | None = None
    policy: Judge | None = None
    per_sample: bool = False
    cross_branch: CrossBranch | None = None

    def __post_init__(self) -> None:
        kinds = {"entropy": EntropyGate, "snr": SnrGate, "change": ChangeGate, "cross_branch": CrossBranch}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise GateError(f"Gates.{name} is {value!r}. Give a {kind.__name__}, or None to leave it out.")
        if self.policy is not None and not isinstance(self.policy, Judge):
            raise GateError(f"Gates.policy is {self.policy!r}. Give Policy.load(path), or None: there is no default.")
        self.cascade()  # the numbers are checked by the gates that they become

    def cascade(self, *, with_snr: bool = True) -> tuple[Gate, ...]:
        """The gates in the order in which they are asked, less those that can block nothing."""
        found: list[Gate] = []
        if self.max_age is not None:
            found.append(AgeGate(self.max_age))
        if self.max_reuse is not None:
            found.append(BudgetGate(self.max_reuse))
        if self.snr is not None and with_snr:
            found.append(self.snr)
        if self.entropy is not None and self.entropy.threshold < math.inf:
            found.append(replace(self.entropy, per_sample=True) if self.per_sample else self.entropy)
        if self.change is not None and self.change.threshold < math.inf:
            found.append(replace(self.change, per_sample=True) if self.per_sample else self.change)
        if self.policy is not None and self.policy.min_probability > 0:
            in_nats = any(isinstance(gate, EntropyGate) and gate.normalize == "row" for gate in found)
            found.append(PolicyGate(self.policy, in_nats))
        return tuple(found)

    @property
    def sharing(self) -> CrossBranch | None:
        """``cross_branch`` as it is asked: for every sample, if all are to be."""
        if self.cross_branch is None or not self.per_sample:
            return self.cross_branch
        return replace(self.cross_branch, per_sample=True)

    @property
    def asks_for_snr(self) -> str:
        """The gate that cannot do without the noise level, by the name of its argument, "" if none: not the default
        one on the level. Where there is one, the caller must say what tells the level."""
        if self.snr is not None and self.snr != SnrGate():
            return "snr"
        return "policy" if "log_snr" in self._policy_features else ""

    @property
    def asks_for_latents(self) -> bool:
        """True if the policy has to be told the norm of the latents."""
        return "log_norm" in self._policy_features

    @property
    def _policy_features(self) -> tuple[str, ...]:
        return next((gate.judge.features for gate in self.cascade() if isinstance(gate, PolicyGate)), ())

    @property
    def measures(self) -> frozenset[str]:
        """What a compute step has to measure for them: ``"entropy:<normalize>:<rows>"``, ``"change"``."""
        found = set()
        for gate in self.cascade():
            if isinstance(gate, EntropyGate):
                found.add(f"entropy:{gate.normalize}:{gate.rows or ''}")
            elif isinstance(gate, ChangeGate):
                found.add("change")
            elif isinstance(gate, PolicyGate):
                if "entropy" in gate.judge.features and not any(name.startswith("entropy") for name in found):
                    found.add(f"entropy:keys:{ENTROPY_ROWS}")
                if "change" in gate.judge.features:
                    found.add("change")
        return frozenset(found)
