"""Dynamo's guards of a capture, written down and put up again around the live model of another process.

torch can write guards itself (``torch._dynamo.aot_compile``), but leaves out those that name an object by its identity
(functions, classes, modules, globals): a processor or a function that was replaced would not be seen. So here all of
them are written down, each with a description of what it was put up on. Where the capture is to be used, every guard's
object is looked up in the live model and has to fit its description. Then Dynamo builds its guards anew, on the live
objects. From there on what is checked at a call is exactly what ``torch.compile`` checks.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import pickle
import textwrap
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch._dynamo.guards import CheckFunctionManager, GuardBuilder
from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState
from torch._guards import Guard, GuardsSet
from torch.utils._ordered_set import OrderedSet
from torch.utils.weak import TensorWeakRef

from dqar_fx.errors import SavedError
from dqar_fx.saving.describe import describe, is_opaque, name_of

#: Guards that hold no more of an object than its class, and those that hold a part of it.
_OF_CLASS = frozenset({"TYPE_MATCH", "NOT_PRESENT_IN_GENERIC_DICT", "DUPLICATE_INPUT", "HASATTR"})
_OF_KEYS = frozenset({"DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"})
#: Kinds of guards behind which Dynamo has taken the object itself for a constant.
_CONSTANT = frozenset({"ID_MATCH", "EQUALS_MATCH", "CONSTANT_MATCH", "WEAKREF_ALIVE", "OBJECT_MATCH"})
_MISSING = "nothing"
#: Characters of a message; a guard on many objects at once names them all.
_LONGEST = 400


class Differs(Exception):
    """What a guard was put up on is another object in this process."""


@dataclass(frozen=True)
class GuardRecord:
    """All guards of one capture, each with what it was put up on, and what else Dynamo needs to build them."""

    guards: tuple[Guard, ...]
    descriptions: tuple[str, ...]
    state: Mapping[str, Any]
    shape_code_parts: Any


class _Manager(CheckFunctionManager, abc.ABC):
    """Dynamo's, with a look at what each guard is built on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: False once an object has died that a guard knows by its identity: another may get that identity.
        self.valid = True
        super().__init__(*args, **kwargs)

    def compile_check_fn(self, builder: GuardBuilder, guards_out: list[Guard], guard_fail_fn: Any) -> None:
        """Dynamo's own, once what the guards are put up on has been looked at."""
        self.look(builder, guards_out)
        super().compile_check_fn(builder, guards_out, guard_fail_fn)

    @abc.abstractmethod
    def look(self, builder: GuardBuilder, guards: Sequence[Guard]) -> None:
        """Called with all guards, in order."""

    def invalidate(self, obj_str: str) -> None:  # noqa: ARG002  # Dynamo's
        """An object that a guard knows by its identity has died."""
        self.valid = False


class _Recorder(_Manager):
    """Writes the guards down."""

    record: GuardRecord

    def look(self, builder: GuardBuilder, guards: Sequence[Guard]) -> None:
        self._descriptions = tuple(_description(builder, guard) for guard in guards)

    def serialize_guards(
        self,
        builder: GuardBuilder,  # noqa: ARG002  # Dynamo's
        sorted_guards: list[Guard],
        output_graph: OutputGraphCommon,
    ) -> bytes:
        """In place of what torch would write."""
        state = output_graph.dump_guards_state()
        if (
            state.torch_function_mode_stack
            or state.functorch_layers
            or state.dual_level >= 0
            or state._aotautograd_guards
        ):
            raise SavedError(
                "the model was captured inside of a mode or a function transform of torch, which cannot be saved. Call "
                "save_compiled outside of it."
            )
        kept = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        kept["skip_guards_check"] = True  # whoever puts them up asks for the answer
        for name in ("local_scope", "global_scope", "_guards"):
            del kept[name]
        self.record = GuardRecord(
            tuple(Guard(g.originating_source, _without_references(g.create_fn)) for g in sorted_guards),
            self._descriptions,
            kept,
            self.shape_code_parts,
        )
        return b""


class _Rebuilt(_Manager):
    """Puts the guards up again, or raises ``Differs``."""

    def __init__(self, record: GuardRecord, code: types.CodeType, local: dict[str, Any], glob: dict[str, Any]) -> None:
        self._record = record
        state = OutputGraphGuardsState(
            local_scope=local, global_scope=glob, _guards=GuardsSet(OrderedSet(record.guards)), **record.state
        )
        super().__init__(code, OutputGraphCommon(state), shape_code_parts=record.shape_code_parts)

    def look(self, builder: GuardBuilder, guards: Sequence[Guard]) -> None:
        # Dynamo sorts them, and not all of the order is determined: by identity.
        known = {id(g): d for g, d in zip(self._record.guards, self._record.descriptions, strict=True)}
        for guard in guards:
            found = _description(builder, guard)
            if found != known[id(guard)]:
                raise Differs(f"{guard.name} was {known[id(guard)]}, and is {found}")


def record_guards(capture: Any, code: types.CodeType) -> GuardRecord:
    """Write down the guards of a capture (a ``GraphCaptureOutput``) of ``code``.

    Raises:
        SavedError: a guard that means something in this process only.
    """
    return _Recorder(code, capture.output_graph, save_guards=True, strict_error=True).record


def dump(record: GuardRecord) -> bytes:
    """As bytes.

    Raises:
        SavedError: a guard holds something that cannot be written.
    """
    try:
        return pickle.dumps(record)
    except Exception as error:  # whatever the reducers of the objects in it raise
        raise SavedError(f"the guards of the capture cannot be written down: {error}.") from error


def rebuild(
    record: GuardRecord, code: types.CodeType, local_scope: dict[str, Any], global_scope: dict[str, Any]
) -> CheckFunctionManager:
    """The guards on the live objects in ``local_scope`` (the arguments of the call) and ``global_scope``.

    Raises:
        Differs: something is not what it was when the guards were written down.
    """
    try:
        return _Rebuilt(record, code, local_scope, global_scope)
    except (AttributeError, KeyError, IndexError, TypeError, AssertionError) as error:  # a path that leads nowhere
        raise Differs(f"a guard cannot be put up ({type(error).__name__}: {error})") from error


def refusal(manager: CheckFunctionManager, scope: dict[str, Any]) -> str:
    """Which guards refuse a call, in Dynamo's words."""
    parts = manager.guard_manager.check_verbose(scope).verbose_code_parts
    return textwrap.shorten("; ".join(parts), _LONGEST)


def _description(builder: GuardBuilder, guard: Guard) -> str:
    """What ``guard`` is put up on, as text."""
    kind = guard.create_fn_name()
    if not guard.name:
        return ""  # of torch's state altogether
    try:
        value = builder.get(guard)
    except Exception:  # that something is not there is what some guards are about
        return _MISSING
    if kind in _OF_CLASS:
        return name_of(type(value))
    if kind in _OF_KEYS or isinstance(value, Mapping):
        # Which keys are looked for is in the guard; the values that matter have guards of their own.
        return f"{name_of(type(value))} {_keys(value) if 'KEYS' in kind or 'LENGTH' in kind else ''}"
    types_of = {kind, *(guard.guard_types or ())}
    if is_opaque(value) and types_of & _CONSTANT:
        raise SavedError(
            f"the model depends on which object {guard.name} is (a {name_of(type(value))}), and that means nothing in "
            f"another process. Such a model cannot be saved."
        )
    return describe(value)


def _keys(value: Mapping[Any, Any]) -> str:
    return describe(list(value))


def _without_references(create: Any) -> Any:
    """A guard's function without the objects it was bound to: it finds them anew."""
    if not isinstance(create, functools.partial):
        return create
    references = (weakref.ref, TensorWeakRef)
    args = tuple(None if isinstance(a, references) else a for a in create.args)
    words = {k: None if isinstance(v, references) else v for k, v in create.keywords.items()}
    return functools.partial(create.func, *args, **words)
