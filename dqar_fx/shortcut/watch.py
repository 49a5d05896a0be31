"""Dynamo's guards in two: what can be watched for writes, and the rest, which is checked as ever.

Nine tenths of the guards of a compiled model are on the model itself: each attribute of each module, one by one, at
every call (1 to 2 ms for 28 blocks, a quarter of a step where these are small). Nearly all are functions of
dictionaries (of attributes, parameters and submodules) and of tensors' looks. Python numbers every write into a
dictionary. So once the guards have passed, it is enough that no dictionary on their way has been written into since,
that the objects have their classes, and the tensors their shapes, strides, dtypes and devices.

What cannot be told so (lists, functions, classes, properties, other dictionaries) and all that is not the model
(arguments, globals, modes of torch) stays with Dynamo: its own guards, in its own C++, less those that are watched.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import RootGuardManager
from torch._dynamo.guards import GuardManagerType

#: Nothing writes into these.
_IMMUTABLE = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size,
)  # fmt: skip
_TENSORS = (torch.Tensor, nn.Parameter)
#: Objects of these kinds have more to them than their attributes.
_OTHER = (type, types.FunctionType, types.MethodType, types.ModuleType, types.BuiltinFunctionType, types.CodeType)
#: Python's own optimisations of a place in the code come after some ten times.
_WRITES = 100
#: How attributes are found if a class says nothing else.
_USUAL: Any = object.__getattribute__
#: Kinds of guards that ask for nothing but an object's identity, class or immutable value; the contents of a plain
#: dictionary; the looks of a tensor. (That a dimension is marked as dynamic asks for a capture of its own, not for
#: another result.)
_OF_IDENTITY = frozenset({"TYPE_MATCH", "ID_MATCH", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH"})
_OF_VALUE = _OF_IDENTITY | {"EQUALS_MATCH", "LENGTH_CHECK"}
_OF_DICT = frozenset({"TYPE_MATCH", "ID_MATCH", "DICT_CONTAINS", "DICT_LENGTH", "LENGTH_CHECK", "DICT_VERSION"})
_OF_TENSOR = frozenset({"TYPE_MATCH", "TENSOR_MATCH", "NO_TENSOR_ALIASING", "DIMENSION_DYNAMIC_MARKING_GUARD"})
#: Guards on several objects at once, which half of a tree cannot check. (Of NO_TENSOR_ALIASING it can its own half, and
#: the rest is seen to: see ``Shortcut``.)
_RELATIONAL = frozenset({"OBJECT_ALIASING", "STORAGE_OVERLAPPING", "SYMBOLIC_SHAPE_GUARD"})
#: What guards are told to say when they fail, and where they come from.
_UNSAID: tuple[Any, ...] = (["changed"], None)
#: How a guard reaches an item of a dictionary or a tuple, the dictionary of an object's attributes, and an attribute.
_ITEM = frozenset({"DictGetItemGuardAccessor", "TupleGetItemGuardAccessor", "GetItemGuardAccessor"})
_ATTRIBUTES, _ATTRIBUTE = "GetGenericDictGuardAccessor", "GetAttrGuardAccessor"


#: What cannot be found.
NOWHERE: Any = object()


class Refused(Exception):
    """Guards that cannot be divided; the message says why."""


class Watch:
    """Dictionaries, objects and tensors as they are now, and whether they still are.

    Holds them: an object that has died could have a successor of the same identity. They lie in one tuple, whose items
    are guarded by guards of Dynamo's own: 20 to 150 ns each, a fifth of what a call of Python would take.

    Raises:
        Refused: this torch takes its guards otherwise.
    """

    def __init__(
        self,
        dicts: Sequence[dict[Any, Any]],
        objects: Sequence[object],
        tensors: Sequence[torch.Tensor],
        sources: frozenset[str] = frozenset(),
    ) -> None:
        #: Where the same tensors are found as long as nothing changes, as Dynamo writes it.
        self.sources = sources
        self.tensor_ids = frozenset(map(id, tensors))
        self._all = {"watched": (*dicts, *objects, *tensors)}
        self._guards = RootGuardManager()
        try:
            items = self._below(self._guards.framelocals_manager, ("watched", 0), self._all["watched"])
            for index, value in enumerate(self._all["watched"]):
                item = self._below(items.tuple_getitem_manager, index, value)
                if index < len(dicts):
                    item.add_dict_version_guard(value, *_UNSAID)
                elif index < len(dicts) + len(objects):
                    item.add_type_match_guard(id(type(value)), *_UNSAID)
                else:
                    assert isinstance(value, torch.Tensor)
                    keys = torch._C._dispatch_keys(value)
                    item.add_tensor_match_guard(
                        value, list(value.shape), list(value.stride()), "", *_UNSAID, type(value), keys
                    )
        except TypeError as error:
            raise Refused(f"guards of this torch are put up otherwise: {str(error).splitlines()[0]}") from error

    @staticmethod
    def _below(manager_of: Any, key: Any, value: object) -> Any:
        return manager_of(
            key=key, source=f"{key}", example_value=value, guard_manager_enum=GuardManagerType.GUARD_MANAGER
        )

    def unchanged(self) -> bool:
        """True if nothing has been written into the dictionaries, and everything else looks as it did."""
        return bool(self._guards.check(self._all))


@functools.cache
def writes_are_noticed() -> bool:
    """True if this Python tells torch of writes into the dictionaries of objects, as fast as it may make them."""

    def write(target: types.SimpleNamespace, value: int) -> None:
        target.number = value  # the same place in the code each time: Python makes it faster after a few

    for value in range(_WRITES):
        target = types.SimpleNamespace(number=-1)
        watch = Watch([vars(target)], [], [])
        if not watch.unchanged():
            return False
        write(target, value)
        if watch.unchanged():
            return False
    return True


def look_up(manager: Any, scope: Mapping[str, Any], function: types.FunctionType) -> Callable[[str], Any]:
    """What finds the object behind a source, as Dynamo writes it; ``NOWHERE`` if it cannot be found.

    Args:
        manager: the guards (a ``GuardManagerWrapper``) that begin with these sources.
        scope: the local variables that a call of ``function`` begins with.
        function: whose frame was captured.
    """
    names = {**manager.closure_vars, "L": scope, "G": function.__globals__}

    def value_of(source: str) -> Any:
        try:
            return eval(source, names)  # an expression of Dynamo's own
        except Exception:  # whatever attributes and items raise
            return NOWHERE

    return value_of


def divide(root: Any, value_of: Callable[[str], Any], model: nn.Module) -> tuple[Any, Watch]:
    """Dynamo's guards (a ``RootGuardManager``) as those that are not watched, and the watch for the others.

    Args:
        root: all guards of one capture, which pass.
        value_of: finds what they guard.
        model: what is watched.

    Raises:
        Refused: some guards tie both halves together, or the model is nowhere in them; or writes go unnoticed.
    """
    if not writes_are_noticed():
        raise Refused("this Python does not tell of writes into objects")
    divided = _Divided(value_of)
    begin = next((n for n in _below(root) if divided.value(n) is model), None)
    if begin is None:
        raise Refused("no guard begins with the model")
    divided.look(begin)
    begins = begin.get_source()
    for node in _below(root, less=begins):
        divided.keep(node)
    if not divided.kept:
        raise Refused("there are no guards but those on the model")
    rest = root.clone_manager(lambda node: node.get_source() in divided.kept)
    if len(rest.get_epilogue_lambda_guards()) != len(root.get_epilogue_lambda_guards()):
        raise Refused("sizes are open, and guarded together")
    dicts, objects, tensors = divided.dicts.values(), divided.objects.values(), divided.tensors.values()
    return rest, Watch([*dicts], [*objects], [*tensors], frozenset(divided.sources - divided.kept))


def _below(node: Any, less: str | None = None) -> list[Any]:
    """``node`` and all guard managers below it, but for those from the source ``less`` on."""
    found, pending = [], [node]
    while pending:
        each = pending.pop()
        if less is not None and each.get_source() == less:
            continue
        found.append(each)
        pending += [child for _, child in _children(each)]
    return found


def _children(node: Any) -> list[tuple[str, Any]]:
    """The guard managers right below ``node``, each with how it is reached: an accessor's name, or "" for an entry of a
    dictionary that is guarded as a whole."""
    children = [(type(a).__name__, c) for a, c in zip(node.get_accessors(), node.get_child_managers(), strict=True)]
    if hasattr(node, "get_key_value_managers"):
        children += [("", each) for pair in node.get_key_value_managers().values() for each in pair if each is not None]
    return children


class _Divided:
    """The model's guards, as they are gone through."""

    def __init__(self, value_of: Callable[[str], Any]) -> None:
        self._value_of = value_of
        self.dicts: dict[int, dict[Any, Any]] = {}
        self.objects: dict[int, object] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        #: Where these tensors were found. (One may lie in a list as well, of which nobody would know.)
        self.sources: set[str] = set()
        #: Sources of the guard managers that stay with Dynamo.
        self.kept: set[str] = set()

    def value(self, node: Any) -> Any:
        """What ``node`` guards."""
        return self._value_of(node.get_source())

    def keep(self, node: Any) -> None:
        """Leave ``node`` to Dynamo."""
        if kinds := _RELATIONAL.intersection(type(guard).__name__ for guard in node.get_leaf_guards()):
            raise Refused(f"{node.get_source()} is guarded together with others ({', '.join(sorted(kinds))})")
        self.kept.add(node.get_source())

    def look(self, node: Any) -> bool:
        """Watch what ``node`` and those below it guard; False if something of it is left to Dynamo."""
        value = self.value(node)
        asked = {type(guard).__name__ for guard in node.get_leaf_guards()} - {"OBJECT_ALIASING"}
        answered = self._watch(value)
        if answered is None:
            for each in _below(node):
                self.keep(each)
            return False
        watched = asked <= answered
        if type(value) in _TENSORS:
            self.sources.add(node.get_source())
        for accessor, child in _children(node):
            if self._reaches(accessor, node, value, child):
                watched &= self.look(child)
            else:
                for each in _below(child):
                    self.keep(each)
                watched = False
        if not watched:
            self.keep(node)  # for its own sake, or as it leads there
        return watched

    def _watch(self, value: Any) -> frozenset[str] | None:
        """Watch ``value``: the kinds of guards on it that this answers; None if it cannot be watched."""
        kind = type(value)
        if _is_immutable(value):
            return _OF_VALUE
        if kind is dict:
            self.dicts[id(value)] = value
            return _OF_DICT
        if kind in _TENSORS:
            self.tensors[id(value)] = value
            return _OF_TENSOR
        if value is NOWHERE or isinstance(value, (*_OTHER, torch.Tensor)):
            return None
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is not dict or kind.__getattribute__ is not _USUAL:
            return None
        self.objects[id(value)] = value
        self.dicts[id(attributes)] = attributes
        return _OF_IDENTITY

    def _reaches(self, accessor: str, node: Any, value: Any, child: Any) -> bool:
        """True if as long as ``value`` is as it is now, its ``child`` is the same object."""
        if type(value) in {dict, tuple}:
            return accessor in _ITEM or not accessor
        if accessor == _ATTRIBUTES:
            return True
        name = child.get_source().removeprefix(node.get_source() + ".")
        if accessor != _ATTRIBUTE or not name.isidentifier():
            return False
        # Otherwise what the class has under that name may be what is found (a property).
        return name == "__dict__" or (name in vars(value) and not hasattr(type(value), name))


def _is_immutable(value: object) -> bool:
    return all(map(_is_immutable, value)) if type(value) is tuple else type(value) in _IMMUTABLE
