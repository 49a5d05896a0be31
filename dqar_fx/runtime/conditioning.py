"""Does a call belong to the generation before it? Judged by the inputs that stay the same throughout one.

The timestep alone cannot tell two runs apart that take turns, or a run that begins in the middle of the schedule from
the next step of one that was abandoned. What a model is conditioned on can: prompt embeddings, masks, labels and ids
are made once per run, and every pipeline hands the same tensors to each step. The latents, the timestep, tables of
positions and what is made anew for each step (ControlNet residuals) are left out, by argument name.

Tensors are the same if they are the same memory, not written into since. No device is read for that. Only where memory
differs from the beginning are values compared: a loop may make its inputs anew at every step. Once a run has shown that
it hands over the same memory, other memory is another run, whatever it holds (two runs of one prompt).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

#: Parts of the names of arguments that change with the step, unless the name says what they are made of.
_CHANGING = (
    "hidden_states", "latent", "sample", "control", "residual", "token", "time", "sigma", "noise", "cache", "rotary",
    "rope", "freqs",
)  # fmt: skip
_CONSTANT = ("encoder", "prompt", "pooled", "text")
#: Elements of a tensor (labels, sizes, a guidance scale) that loops commonly make anew at every step.
_SMALL = 64
#: Cosine of two latents above which they may be of one run.
_ALIKE = 0.5
_version = operator.attrgetter("_version")
QUOTED = re.compile(r"\['([^']*)'\]")


def is_conditioning(name: str) -> bool:
    """True if an argument called ``name`` stays the same during a generation (judged by the words in its name)."""
    return any(word in name for word in _CONSTANT) or not any(word in name for word in _CHANGING)


def tensors_in(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an argument, by name; those of a list or a dict have names of their own."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if is_conditioning(str(key)):
                yield from tensors_in(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{name}.{index}")


def version(tensor: torch.Tensor) -> int:
    """How often ``tensor`` has been written into; inference tensors do not count it."""
    return -1 if tensor.is_inference() else tensor._version


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """``version`` of each of many tensors, without a call for each where none is an inference tensor."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return [version(t) for t in tensors]


def identical(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """True if both hold the same objects (or, for one-element tensors, equal ones of the same version)."""
    try:
        # Comparing sequences tries identity first, in C: ten times faster than a loop, for hundreds of parameters.
        return bool(some == others)
    except (RuntimeError, TypeError, ValueError):  # ... and where it fails, `==` of two tensors is no truth value
        return False


@dataclass(slots=True)
class _Held:
    """A tensor as a call gave it, held so that its memory cannot be taken by another."""

    tensor: torch.Tensor
    version: int
    stays: bool = False  # the run has shown that it hands over the same memory
    made_anew: bool = False  # the run has shown that it makes this at every step

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Held:
        return cls(tensor, version(tensor))

    def is_memory_of(self, given: _Held) -> bool:
        """True if ``given`` is the same memory, not written into since."""
        return self.version == given.version and same_memory(self.tensor, given.tensor)

    def equals(self, given: _Held) -> bool:
        """True if ``given`` has the same values, and it is not known that it would be the same memory."""
        a, b = self.tensor, given.tensor
        if self.stays or self.version != version(a) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return torch.equal(a, b)


class Inputs(dict[str, _Held]):
    """The conditioning tensors of one call, by name, and its latents (the forward's first argument)."""

    latents: object = None

    def stay(self, relation: Relation) -> Relation:
        """Note that the run hands over the same memory; gives back ``relation``."""
        for held in self.values():
            held.stays = True
        return relation


class InputReader:
    """Picks the conditioning out of a call's arguments.

    Args:
        names: parameters of the forward, in order; the first but the timestep is the latents.
        timestep: the one that holds the timestep, "" if there is none.
    """

    def __init__(self, names: list[str], timestep: str) -> None:
        others = [name for name in names if name != timestep]
        self._latents = (others[0], names.index(others[0])) if others else ("", 0)
        self._positions = {name: names.index(name) for name in others[1:] if is_conditioning(name)}
        self._chosen = {name: name in self._positions for name in names}

    def __call__(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Inputs:
        """The conditioning tensors of one call of the module."""
        inputs = Inputs()
        name, position = self._latents
        inputs.latents = args[position] if position < len(args) else kwargs.get(name)
        for name, position in self._positions.items():
            if position < len(args):
                inputs.update((n, _Held.of(t)) for n, t in tensors_in(args[position], name))
        for name, value in kwargs.items():
            chosen = self._chosen.get(name)
            if chosen is None:  # goes through **kwargs
                chosen = self._chosen[name] = is_conditioning(name)
            if not chosen:
                continue
            if isinstance(value, torch.Tensor):  # as nearly always; and this runs at every call
                inputs[name] = _Held(value, version(value))
            else:
                inputs.update((n, _Held.of(t)) for n, t in tensors_in(value, name))
        return inputs


class SourceReader:
    """The same for a captured graph, whose arguments are flat and named by where Dynamo took them from.

    Args:
        sources: of each argument, e.g. ``L['added_cond_kwargs']['resolution']``.
        timestep: position of the timestep among them, None if there is none.
    """

    def __init__(self, sources: Sequence[str], timestep: int | None) -> None:
        found = []
        for position, source in enumerate(sources):
            words = QUOTED.findall(source)
            if source.startswith("L['") and words and words[0] != "self" and position != timestep:
                found.append((source, position, all(is_conditioning(word) for word in words)))
        # The latents come first of what is not named after a prompt: arguments are in the order of their first use.
        latents = (position for name, position, _ in found if not any(word in name for word in _CONSTANT))
        self._latents: int | None = next(latents, None)
        self._positions = {name: position for name, position, chosen in found if chosen and position != self._latents}

    def __call__(self, arguments: Sequence[object]) -> Inputs:
        """The conditioning tensors of one call of the graph."""
        given = ((name, arguments[position]) for name, position in self._positions.items())
        inputs = Inputs((name, _Held.of(value)) for name, value in given if isinstance(value, torch.Tensor))
        inputs.latents = arguments[self._latents] if self._latents is not None else None
        return inputs


class Relation(Enum):
    """How a call's conditioning relates to that of the calls before it in its branch."""

    FIRST = "the branch was not called before"
    LAST = "that of the last call"
    EARLIER = "that of another call at the last call's step"
    EQUAL = "of the same values, in other memory, for the first time"
    SHAPE = "of another shape"
    OTHER = "another"


class Conditioning:
    """What the calls of one generation were conditioned on, by branch."""

    def __init__(self) -> None:
        #: What the calls at the present step had, oldest first: several where calls repeat without a name.
        self._seen: dict[str, list[Inputs]] = {}
        #: The same for the step before.
        self._before: dict[str, list[Inputs]] = {}

    def clear(self) -> None:
        """Forget what was seen, and let go of the tensors."""
        self._seen.clear()
        self._before.clear()

    def relation(self, branch: str, inputs: Inputs) -> Relation:
        """What ``inputs`` are to the calls before in ``branch``; notes on them what that shows of the run."""
        known = self._seen.get(branch)
        if not known:
            return Relation.FIRST
        # Nearly every call ends here, and it is on the host's time.
        if _is_memory(known[-1], inputs):
            return inputs.stay(Relation.LAST)
        if any(_is_memory(call, inputs) for call in known[:-1]):
            return inputs.stay(Relation.EARLIER)
        if any(_is_memory(call, inputs) for call in self._before.get(branch, ())):
            return Relation.OTHER  # of a call that comes once a step, and it is not the turn of this one
        for relation, calls in ((Relation.LAST, known[-1:]), (Relation.EARLIER, known[:-1])):
            for call in calls:
                equal = _equal(call, inputs)
                if equal is not None:
                    return relation if equal or _alike(call.latents, inputs.latents) else Relation.EQUAL
        shapes = [{name: held.tensor.shape for name, held in call.items()} for call in (*known, inputs)]
        return Relation.OTHER if shapes[-1] in shapes[:-1] else Relation.SHAPE

    def differing(self, branch: str, inputs: Inputs) -> list[str]:
        """Names of the inputs that are other memory than the last call's in ``branch``."""
        last = self._seen.get(branch, [Inputs()])[-1]
        return [n for n in inputs if n not in last or not last[n].is_memory_of(inputs[n])]

    def note(self, branch: str, inputs: Inputs, *, repeated: bool) -> None:
        """A call of ``branch`` had ``inputs``; ``repeated`` if it is not the first at its step."""
        if repeated:
            # A few are remembered, so that guidance in two calls is not taken for a new run at every step.
            self._seen[branch] = [*self._seen.get(branch, ())[-3:], inputs]
        else:
            self._before[branch] = self._seen.get(branch, [])
            self._seen[branch] = [inputs]


def _is_memory(call: Inputs, inputs: Inputs) -> bool:
    if call.keys() != inputs.keys():
        return False
    for name, held in call.items():
        given = inputs[name]
        # The same object, mostly: without a call for each.
        if held.version != given.version or not (held.tensor is given.tensor or held.is_memory_of(given)):
            return False
    return True


def _equal(call: Inputs, inputs: Inputs) -> bool | None:
    """None if some value differs; True if the same run may well have made them, False if that is in doubt.

    In doubt it is where a large tensor (a prompt's embedding) is in other memory and this was not seen before: a run
    of the same prompt may have begun, in the middle of the schedule, where another was abandoned after one call. (The
    latents will tell.)
    """
    if call.keys() != inputs.keys():
        return None
    certain = True
    for name, held in call.items():
        given = inputs[name]
        if held.is_memory_of(given):
            given.stays = True
        elif not held.equals(given):
            return None
        else:
            certain &= held.made_anew or given.tensor.numel() <= _SMALL
            given.made_anew = True
    return certain


def _alike(before: object, after: object) -> bool:
    """True if the latents ``after`` may be one step further than ``before``, False if they are other noise.

    A step of a sampler takes little away: the cosine between its latents is near 1, and near 0 for other noise.
    """
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.shape != after.shape:
        return False
    if same_memory(before, after):
        return True  # updated in place
    a, b = before.flatten().float(), after.to(before.device).flatten().float()
    return bool(torch.dot(a, b) > _ALIKE * a.norm() * b.norm())


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if both are one object, or views of the same elements."""
    if a is b:
        return True
    try:
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and a.device == b.device
            and a.stride() == b.stride()
            and a.numel() > 0
            and a.data_ptr() == b.data_ptr()
            and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        )
    except RuntimeError:  # tensors without storage (sparse, wrapped)
        return False
