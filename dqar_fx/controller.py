"""DQAR's own controller, for a sampling loop that is driven by hand: it decides and stores, the caller computes.

The same schedule, gates and quantisation as under ``optimize``, without ``torch.compile``: for a model that cannot be
captured, for trying a gate out, and for reading what DQAR does. Every step begins with :meth:`Controller.begin_step`;
every attention asks, and then reads or computes::

    controller = Controller(Schedule.interval(50, every=3), num_sites=28)
    for step in range(50):
        controller.begin_step(step)
        ...  # and in each block, which knows its number:
        if controller.should_reuse(site, like=x):
            y = controller.reuse(site)
        else:
            y = controller.commit(site, attention(x))

Not safe for several threads: give each generation that runs at the same time a controller of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dqar_fx.config import CacheConfig
from dqar_fx.errors import CacheError, GateError, PlanError, RuntimeStateError
from dqar_fx.gates import AgeGate, BudgetGate, Candidate, Gate, Gates, Measurement, SnrGate
from dqar_fx.plan import Plan
from dqar_fx.policy import PolicyGate
from dqar_fx.quantize import dequantize, quantize
from dqar_fx.schedule import Schedule

__all__ = ["Controller", "ControllerStats", "Decision"]

Values = TypeVar("Values", Tensor, tuple[Tensor, ...])
#: A number, or one for each sample; or a function that measures it, called only if no gate before has blocked.
Measured: TypeAlias = float | Tensor | Callable[[], float | Tensor]

#: Gates that need no measurement, so that none is made (and no device waited for) where one of them blocks.
_FREE = (AgeGate, BudgetGate, SnrGate)


@runtime_checkable
class _Probable(Protocol):
    """A gate that does not only allow but says how likely the reuse is to be good (a learned policy)."""

    def probability(self, candidate: Candidate) -> float: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one site; true where the stored value may be read.

    Attributes:
        use: read the stored value.
        reason: why, in one word: ``reuse``; or, of a compute, the first to block: ``warmup``, ``schedule``, ``stale``
            (a refresh of the schedule, or the gate on age), ``repeat`` (another call at this step cannot be told from
            this one), ``empty``, ``shape`` or the reason of a gate (``budget``, ``snr``, ``entropy``, ``change``, ...).
        probability: what a learned policy gave, None where none was asked.
        step: counted from 0.
        branch: one of several calls at the same step.
        site: its number.
    """

    use: bool
    reason: str
    probability: float | None = None
    step: int = -1
    branch: str = ""
    site: int = -1

    @property
    def action(self) -> str:
        """``"reuse"`` or ``"compute"``, as in the decisions of a ``Runtime``."""
        return "reuse" if self.use else "compute"

    def __bool__(self) -> bool:  # without it every decision would be true, a refusal too
        return self.use


@dataclass(frozen=True, slots=True)
class ControllerStats:
    """Counts of the current generation.

    Attributes:
        computed: values committed.
        reused: values read.
        cache_bytes: held by the stored values now.
        reasons: how often each reason was given.
    """

    computed: int
    reused: int
    cache_bytes: int
    reasons: dict[str, int]

    @property
    def reuse_ratio(self) -> float:
        """``reused / (reused + computed)``, 0 before the first."""
        return self.reused / max(self.reused + self.computed, 1)


@dataclass(slots=True)
class _Stored:
    """One tensor as it is kept: itself, or its quantised values and scales."""

    parts: tuple[Tensor, ...]
    layout: tuple[torch.Size, torch.dtype, torch.device]  # of the tensor that was committed
    group: int | None = None  # INT4: channels that share a scale

    def read(self) -> Tensor:
        """A tensor of its own: what the caller writes into it must not reach the cache."""
        shape, dtype, device = self.layout
        with torch.no_grad():
            if len(self.parts) == 1:
                return self.parts[0].to(device, copy=True)
            q, scale = (part.to(device) for part in self.parts)
            return dequantize(q, scale, dtype, size=shape[-1], group=self.group)

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)


@dataclass(slots=True)
class _Entry:
    """What one site has stored in one branch."""

    values: tuple[_Stored, ...]
    is_tuple: bool
    step: int  # at which it was computed
    last_use: int  # the last step at which it was committed or read
    is_repeated: bool  # committed at that step after it was used at it: nobody knows by which of the calls
    entropy: float | Tensor | tuple[float, float] | None
    change: float | Tensor | tuple[float, float] | None
    reads: int = 0


@dataclass(slots=True)
class _Generation:
    """All that is forgotten when a new generation begins."""

    step: int = -1
    entries: dict[tuple[str, int], _Entry] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    computed: int = 0
    reused: int = 0
    timestep: float | None = None
    direction: float = 0.0  # of the timesteps, 0 while not known

    def turns_round(self, timestep: float | None) -> bool:
        """True if ``timestep`` is back where this generation has been."""
        return timestep is not None and self.timestep is not None and (timestep - self.timestep) * self.direction < 0

    def at(self, timestep: float | None) -> None:
        """Note the timestep of this step."""
        if timestep is None:
            return
        if self.timestep is not None and timestep != self.timestep:
            self.direction = timestep - self.timestep
        self.timestep = timestep


class Controller:
    """Decides at every step and site whether a stored value may be read, and stores values.

    It asks in DQAR's order, cheapest first: warm-up and schedule, is anything stored, is it that of this call (shape),
    then the gates: age, budget, SNR, entropy, change, policy. The first to block gives the reason. Other than under
    ``optimize``, a measurement of this very step can decide, at the price of waiting for the device.

    Args:
        schedule: which site may reuse at which step, or a plan.
        num_sites: attentions of the model; sites are numbered from 0 in model order, for the schedule.
        gates: what may block beyond the schedule; None for nothing. ``Gates()`` has the gates on entropy and SNR.
        cache: how values are stored (INT8 per token by default). ``granularity="head"`` needs ``[B, H, N, d]``.
        num_steps: of a generation, where it is not that of the schedule. Steps beyond it compute.

    Raises:
        ScheduleError, PlanError: the schedule or plan does not fit these numbers.
        CacheError: ``cache`` has a dtype each for keys and values, or a balance.
        GateError: the gates are to share between branches, or a policy stands behind an ``EntropyGate`` that measures
            in nats.
    """

    def __init__(
        self,
        schedule: Schedule | Plan,
        num_sites: int,
        *,
        gates: Gates | None = None,
        cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen, so one default serves all calls
        num_steps: int | None = None,
    ) -> None:
        if isinstance(cache.dtype, tuple):
            raise CacheError(
                f"CacheConfig.dtype is {cache.dtype}, a pair for keys and values, but a controller stores what it is "
                f"given, all of it alike. Use one dtype."
            )
        if cache.balance is not None:
            raise CacheError(
                "CacheConfig.balance is set, but a controller does not know whose channels it stores. Leave it out."
            )
        if gates is not None and gates.cross_branch is not None:
            raise GateError(
                f"Gates.cross_branch is {gates.cross_branch}, but a controller shares nothing between branches. Leave "
                f"it out, or use dqar_fx.optimize."
            )
        if gates is not None and any(isinstance(gate, PolicyGate) and gate.in_nats for gate in gates.cascade()):
            raise GateError(
                f"Gates.policy is told entropies as a share of ln(keys), and {gates.entropy} asks for them in nats, "
                f"but a controller does not know the keys. Use EntropyGate(..., normalize='keys'), or "
                f"Gates(entropy=None)."
            )
        self.plan = schedule.plan(num_sites, num_steps)
        self.gates = gates
        self.cache = cache
        measures = frozenset[str]() if gates is None else gates.measures
        self._measures_entropy = any(name.startswith("entropy") for name in measures)
        self._measures_change = "change" in measures
        # A value that no later step may read is not stored: with nothing to reuse, nothing is kept or quantised.
        reuse = self.plan.reuse
        self._last_read = np.where(reuse.any(0), len(reuse) - 1 - reuse[::-1].argmax(0), -1).tolist()
        self._generation = _Generation()
        self._kept: dict[tuple[str, int], tuple[_Stored, ...]] = {}  # buffers of generations past, if kept
        self._snr = math.nan
        self._cascade: tuple[Gate, ...] = ()
        self._prompt_length: int | None = None
        self._latent_norm: float | Tensor | None = None

    def begin_step(
        self,
        step: int,
        *,
        snr: float | None = None,
        prompt_length: int | None = None,
        timestep: float | None = None,
        latent_norm: float | Tensor | None = None,
    ) -> None:
        """All that follows, up to the next ``begin_step``, is step ``step``.

        Step 0, a step that repeats and one that runs backwards begin a new generation: what was stored is forgotten.
        What the last generation has stored stays until then, or until :meth:`reset`.

        Args:
            step: counts calls of the denoiser from 0; guidance in two calls is one step with two branches.
            snr: signal-to-noise ratio at this step (``metrics.snr(scheduler)[step]``). Without it the gate that
                ``Gates`` has by default is left out.
            prompt_length: tokens of the prompt, which the limit of the gate on entropy grows with; None without one.
            timestep: the noise level, if at hand: where it turns round, a new generation begins too, so that a step
                that was counted on by mistake brings no image into the next.
            latent_norm: ``metrics.latent_norm(x)`` of the latents, which a learned policy may decide by; of several
                samples, their mean does. Without it such a policy blocks.

        Raises:
            RuntimeStateError: ``step`` is not an int of at least 0.
            GateError: a gate on the SNR was chosen, and ``snr`` is None; or ``prompt_length`` is no number of tokens.
        """
        if not _is_count(step):
            raise RuntimeStateError(f"begin_step({step!r}): give the index of the step, an int that counts from 0.")
        if prompt_length is not None and not _is_count(prompt_length):
            raise GateError(f"begin_step({step}): prompt_length is {prompt_length!r}. Give its tokens, or None.")
        if snr is None and self.gates is not None and (asks := self.gates.asks_for_snr):
            raise GateError(
                f"begin_step({step}) got no snr, which {getattr(self.gates, asks)} decides by. Pass "
                f"snr=metrics.snr(scheduler)[step], or leave the gate out: Gates({asks}=None)."
            )
        level = None if timestep is None else float(timestep)
        if step <= self._generation.step or self._generation.turns_round(level):
            self.reset()
        self._generation.step = int(step)
        self._generation.at(level)
        self._snr = math.nan if snr is None else float(snr)
        self._cascade = () if self.gates is None else self.gates.cascade(with_snr=snr is not None)
        self._prompt_length = prompt_length
        self._latent_norm = latent_norm

    def should_reuse(
        self,
        site: int,
        branch: str = "",
        *,
        entropy: Measured | None = None,
        change: Measured | None = None,
        like: Tensor | tuple[Tensor, ...] | None = None,
    ) -> Decision:
        """Ask whether the stored value of ``site`` may be read at this step: true or false, with a reason.

        Args:
            site: its number.
            branch: one of several calls at the same step ("cond", "uncond"); each has its own values.
            entropy: of the attention, measured at this step: ``metrics.attention_entropy(q, k)``, with the same
                ``normalize`` as the gate (``"keys"`` for a policy without one); None for what ``commit`` was given with
                the stored value, without which the gate blocks. A function is called only if no gate before has
                blocked.
            change: of the result, relative to its size; None for what was measured when it was last computed.
            like: what the value must agree with in shape, dtype and device; of a transformer, the attention's input.
                Give it where the batch or the size may change within a generation.

        Raises:
            RuntimeStateError: before the first ``begin_step``.
            PlanError: there is no such site.
        """
        now = self._at(site)
        use, reason, probability = self._decide(site, branch, entropy, change, like)
        decision = Decision(use, reason, probability, now.step, branch, site)
        now.decisions.append(decision)
        return decision

    def commit(
        self,
        site: int,
        value: Values,
        branch: str = "",
        *,
        entropy: Measured | None = None,
    ) -> Values:
        """Store what ``site`` has computed at this step, age and budget beginning anew; returns ``value`` as it is.

        What no later step may read by the schedule is not stored.

        Args:
            site: its number.
            value: a tensor ``[B, ...]``, or a tuple of them (joint attention). A copy is kept, never a reference.
            branch: as for ``should_reuse``.
            entropy: of this attention, for the decisions at later steps that bring none of their own. A function is
                called only if the value is stored and there is a gate on entropy.

        Raises:
            RuntimeStateError: before the first ``begin_step``.
            PlanError: there is no such site.
            CacheError: ``value`` is not of tensors, or cannot be quantised (``CacheConfig(dtype="native")`` takes any).
        """
        now = self._at(site)
        tensors = _checked(site, value)
        now.computed += 1
        key = (branch, site)
        before = now.entries.pop(key, None)
        if self._last_read[site] <= now.step:
            return value
        change = _change(tensors, before) if before is not None and self._measures_change else None
        now.entries[key] = _Entry(
            values=self._store(key, tensors),  # writes over what was kept: nothing may compare with that any more
            is_tuple=isinstance(value, tuple),
            step=now.step,
            last_use=now.step,
            is_repeated=before is not None and before.last_use == now.step,
            entropy=(entropy() if self._measures_entropy else None) if callable(entropy) else entropy,
            change=change,
        )
        return value

    def reuse(self, site: int, branch: str = "", *, like: Tensor | tuple[Tensor, ...] | None = None) -> Any:
        """The stored value of ``site``, as it was committed: a tensor or a tuple, dtype and device its own; counted.

        Raises:
            RuntimeStateError: before the first ``begin_step``; nothing is stored; or it is not ``like`` what was asked.
            PlanError: there is no such site.
        """
        now = self._at(site)
        entry = now.entries.get((branch, site))
        if entry is None:
            stored = sorted({name for name, number in now.entries if number == site})
            elsewhere = f" (only for branch {', '.join(map(repr, stored))})" if stored else ""
            raise RuntimeStateError(
                f"reuse({site}, {branch!r}) at step {now.step}: nothing is stored{elsewhere}. Call it only where "
                f"should_reuse says so; otherwise compute, and commit the result."
            )
        if like is not None and not _fits(entry, like):
            raise RuntimeStateError(
                f"reuse({site}, {branch!r}) at step {now.step}: stored is {_describe(v.layout for v in entry.values)}, "
                f"asked for is {_describe(map(_layout, _tuple(like)))}. Ask should_reuse(..., like=...), and compute."
            )
        entry.reads += 1
        entry.last_use = now.step
        now.reused += 1
        values = tuple(stored.read() for stored in entry.values)
        return values if entry.is_tuple else values[0]

    def reset(self) -> None:
        """Forget everything stored and counted; ``begin_step`` does so between generations."""
        self._generation = _Generation()

    @property
    def decisions(self) -> list[Decision]:
        """All that ``should_reuse`` has answered in this generation, in order."""
        return list(self._generation.decisions)

    @property
    def stats(self) -> ControllerStats:
        """What happened in this generation."""
        now = self._generation
        stored = [value for entry in now.entries.values() for value in entry.values]
        reasons = dict(Counter(decision.reason for decision in now.decisions))
        return ControllerStats(now.computed, now.reused, sum(value.bytes for value in stored), reasons)

    def _decide(
        self,
        site: int,
        branch: str,
        entropy: Measured | None,
        change: Measured | None,
        like: Tensor | tuple[Tensor, ...] | None,
    ) -> tuple[bool, str, float | None]:
        now = self._generation
        plan = self.plan
        if now.step >= plan.num_steps:
            return False, "schedule", None
        if not plan.reuse[now.step, site]:
            return False, plan.reason(now.step, site), None
        entry = now.entries.get((branch, site))
        if entry is None:
            return False, "empty", None
        if entry.is_repeated or entry.last_use == now.step:
            return False, "repeat", None
        if like is not None and not _fits(entry, like):
            return False, "shape", None

        candidate = Candidate(
            step=now.step,
            num_steps=plan.num_steps,
            site=site,
            num_sites=plan.num_sites,
            age=now.step - entry.step,
            reuses=entry.reads,
            snr=self._snr,
            prompt_length=self._prompt_length,
        )
        is_measured = False
        probability = None
        for gate in self._cascade:
            if not is_measured and not isinstance(gate, _FREE):
                self._measure(candidate, entry, entropy, change)
                is_measured = True
            if isinstance(gate, _Probable):
                probability = float(gate.probability(candidate))
            if not gate.allows(candidate):
                return False, gate.reason, probability
        return True, "reuse", probability

    def _measure(
        self,
        candidate: Candidate,
        entry: _Entry,
        entropy: Measured | None,
        change: Measured | None,
    ) -> None:
        """Fill in what was measured: now if the caller did, else when the value was computed."""
        # Once per stored value: the numbers may lie on a device that has to be waited for.
        if not isinstance(entry.entropy, tuple):
            entry.entropy = _mean_and_max(entry.entropy)
        if not isinstance(entry.change, tuple):
            entry.change = _mean_and_max(entry.change)
        mean, largest = entry.entropy if entropy is None else _mean_and_max(entropy)
        change_mean, change_max = entry.change if change is None else _mean_and_max(change)
        candidate.measured = Measurement(mean, largest, change_mean, change_max)
        if self.gates is not None and self.gates.asks_for_latents:
            candidate.latent_norm = _mean_and_max(self._latent_norm)[0]

    def _at(self, site: int) -> _Generation:
        if self._generation.step < 0:
            raise RuntimeStateError("no step has begun. Call begin_step(0) before the first call of the model.")
        if not _is_count(site) or site >= self.plan.num_sites:
            raise PlanError(f"there is no site {site!r}: the controller has {self.plan.num_sites}, numbered from 0.")
        return self._generation

    def _store(self, key: tuple[str, int], tensors: tuple[Tensor, ...]) -> tuple[_Stored, ...]:
        # Outside of inference mode: a value that was stored in it may be read outside.
        with torch.inference_mode(False), torch.no_grad():
            values = tuple(_Stored(self._pack(tensor), _layout(tensor), self.cache.group) for tensor in tensors)
            kept = self._kept.get(key, ()) if self.cache.keep_buffers else ()
            if [value.layout for value in kept] != [value.layout for value in values]:
                if self.cache.keep_buffers:
                    self._kept[key] = values
                return values
            for old, new in zip(kept, values, strict=True):
                for buffer, part in zip(old.parts, new.parts, strict=True):
                    buffer.copy_(part)
            return kept

    def _pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        device = torch.device(self.cache.device or tensor.device)
        if self.cache.dtype == "native":
            return (tensor.to(device, copy=True),)
        bits = 4 if self.cache.dtype == "int4" else 8
        packed = quantize(tensor, self.cache.granularity, bits=bits, group=self.cache.group)
        return tuple(part.to(device) for part in packed)


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)


def _tuple(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


def _checked(site: int, value: Any) -> tuple[Tensor, ...]:
    tensors = _tuple(value)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        kinds = ", ".join(type(tensor).__name__ for tensor in tensors)
        raise CacheError(f"commit({site}) got ({kinds}). Give a tensor, or a tuple of at least one.")
    return tensors


def _layout(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _fits(entry: _Entry, like: Tensor | tuple[Tensor, ...]) -> bool:
    return [value.layout for value in entry.values] == [_layout(tensor) for tensor in _tuple(like)]


def _describe(layouts: Iterator[tuple[torch.Size, torch.dtype, torch.device]]) -> str:
    return " and ".join(f"{dtype} {list(shape)} on {device}" for shape, dtype, device in layouts)


def _mean_and_max(measured: Measured | None) -> tuple[float, float]:
    """Over the samples; NaN where nothing was measured, or any of it is NaN."""
    if measured is None:
        return math.nan, math.nan
    values = measured() if callable(measured) else measured
    on_host = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(on_host, dtype=np.float64)
    return (float(array.mean()), float(array.max())) if array.size else (math.nan, math.nan)


def _change(new: tuple[Tensor, ...], before: _Entry) -> Tensor | None:
    """``|new - stored| / |new|`` over all exits, for each sample ``[B]``; None if they cannot be compared."""
    if not _fits(before, new) or any(tensor.ndim == 0 for tensor in new):
        return None
    with torch.no_grad():
        pairs = [(tensor.float(), stored.read().float()) for tensor, stored in zip(new, before.values, strict=True)]
        difference = torch.stack([_power(value - stored) for value, stored in pairs]).sum(0)
        size = torch.stack([_power(value) for value, _ in pairs]).sum(0)
        return torch.where(difference == 0, difference, difference / size).sqrt()  # zeros that stay zeros: no change


def _power(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).square().sum(-1)
