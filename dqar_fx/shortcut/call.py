"""An optimised model's calls past Dynamo's guards."""

from __future__ import annotations

import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dqar_fx.runtime.program import CapturedGraph
from dqar_fx.shortcut.code import NotFound, without_fetching
from dqar_fx.shortcut.watch import Refused, Watch, divide, look_up

logger = logging.getLogger(__name__)

_Run = Callable[[CapturedGraph, Sequence[Any]], Any]

#: What a call returns that has to go through Dynamo.
MISS: Any = object()
#: How often in a row a model may be found changed before its guards are checked at every call for good.
PATIENCE = 4
#: Captures that are tried at a call, the last used first: one for each shape that a run has.
_TRIED = 4


class Binder:
    """The local variables that a call of a function begins with, which is what Dynamo's guards begin with.

    ``inspect.Signature.bind`` gives the same in ten times the time.
    """

    def __init__(self, function: types.FunctionType) -> None:
        code = function.__code__
        count = code.co_argcount
        self._names = code.co_varnames[:count]
        words = code.co_varnames[count : count + code.co_kwonlyargcount]
        rest = iter(code.co_varnames[count + len(words) :])
        self._rest = next(rest) if code.co_flags & inspect.CO_VARARGS else ""
        self._words = next(rest) if code.co_flags & inspect.CO_VARKEYWORDS else ""
        self._known = frozenset((*self._names, *words))
        self._positional_only = code.co_posonlyargcount
        values = function.__defaults__ or ()
        self._defaults = {
            **dict(zip(self._names[count - len(values) :], values, strict=True)), **(function.__kwdefaults__ or {}),
        }  # fmt: skip
        self._cells = tuple(zip(code.co_freevars, function.__closure__ or (), strict=True))

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """By name; None where the call is none of the function's (which itself says why), or is no plain one."""
        given = self._names[: len(args)]
        if self._positional_only or not kwargs.keys().isdisjoint(given):
            return None
        scope = self._defaults.copy()
        scope.update(zip(given, args, strict=False))
        if self._rest:
            scope[self._rest] = args[len(given) :]
        elif len(args) > len(given):
            return None
        if self._words:
            scope[self._words] = {name: value for name, value in kwargs.items() if name not in self._known}
            scope.update((name, value) for name, value in kwargs.items() if name in self._known)
        elif kwargs.keys() <= self._known:
            scope.update(kwargs)
        else:
            return None
        if not scope.keys() >= self._known:
            return None
        try:
            scope.update((name, cell.cell_contents) for name, cell in self._cells)
        except ValueError:  # a cell without contents
            return None
        return scope


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """What stands in for a model's forward.

    Attributes:
        code: calls the graph, and makes what the model returns.
        names: the global names that it uses.
        manager: Dynamo's guards, a ``GuardManagerWrapper``.
        is_valid: False once it must not be used any more, whatever the guards say.
    """

    code: types.CodeType
    names: dict[str, Any]
    manager: Any
    is_valid: Callable[[], bool]


def _compiled_by_dynamo(function: types.FunctionType) -> Iterator[Compiled]:
    """All that Dynamo has compiled for ``function``, and has not thrown away."""
    for entry in eval_frame._debug_get_cache_entry_list(function.__code__):
        manager = entry.guard_manager  # outlives the entry, and is told when that goes
        yield Compiled(entry.code, function.__globals__, manager, lambda it=manager: it.cache_entry is not None)  # type: ignore[misc]


@dataclass(slots=True, eq=False)
class _Shortcut:
    """One capture: its guards in two halves, what to call, and whether that was called."""

    compiled: Compiled
    rest: Any
    watch: Watch
    run: Callable[..., Any]
    taken: bool = False

    def fits(self, scope: Mapping[str, Any]) -> bool:
        """True if Dynamo's guards, all of them, would pass for a call that begins with ``scope``."""
        if not (self.compiled.is_valid() and self.rest.check(scope) and self.watch.unchanged()):
            return False
        # Dynamo's own half of this guard sees to it that no two arguments are one tensor.
        return self.watch.tensor_ids.isdisjoint(map(id, _tensors(scope.values())))

    @property
    def is_current(self) -> bool:
        """True if the model is what it was."""
        return self.compiled.is_valid() and self.watch.unchanged()


def _is_counted() -> bool:
    """True inside of what is compiled with ``fullgraph=True``: torch counts frames, and raises if none was compiled."""
    count = getattr(torch._C._dynamo.eval_frame, "set_fullgraph_compiled_frame_count", None)
    if count is None:  # an older torch
        return False
    before: int = count(-1)  # how many so far, and no longer counted; -1 if they are not
    count(before)
    return before >= 0


def _tensors(values: Any) -> list[torch.Tensor]:
    """All tensors among ``values`` and in plain containers among them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


class Shortcuts:
    """Those of one model.

    A call takes one if Dynamo would run the very code that it ran before: the same forward, no hooks, no mode that
    torch.compile steps aside for, and guards that pass. ``learn`` after each call that went through Dynamo.

    Args:
        model: the optimised model.
        run: runs a graph of it on the graph's inputs.
    """

    def __init__(self, model: nn.Module, run: _Run) -> None:
        self._model = weakref.ref(model)
        self._run = run
        self._function: types.FunctionType | None = None
        self._binder: Binder | None = None
        self._known: tuple[_Shortcut, ...] = ()
        self._of_graph: dict[object, _Shortcut] = {}
        self._changes: dict[object, int] = {}
        #: What there is besides what Dynamo compiled: a loaded capture.
        self.loaded: Callable[[], Iterable[Compiled]] | None = None
        #: Calls that took one.
        self.taken = 0
        #: Why some captures have none.
        self.reasons: dict[object, str] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns, or ``MISS`` if Dynamo has to be asked."""
        if not self._known:
            return MISS
        model = self._model()
        if model is None or not self._is_plain(model):
            return MISS
        assert self._binder is not None
        scope = self._binder((model, *args), kwargs)
        if scope is None:
            return MISS
        for index, shortcut in enumerate(self._known):
            if shortcut.fits(scope):
                if index:
                    self._known = (shortcut, *(each for each in self._known if each is not shortcut))
                self.taken += 1
                shortcut.taken = True
                return shortcut.run(model, *args, **kwargs)
        return MISS

    def _is_plain(self, model: nn.Module) -> bool:
        """True if between this call and the forward there is nothing, and around it no mode of torch."""
        return (
            getattr(model.forward, "__func__", None) is self._function
            and not (model._forward_hooks or model._forward_pre_hooks or model._backward_hooks)
            and not (model._backward_pre_hooks or modules._has_any_global_hook())  # type: ignore[no-untyped-call]  # torch
            and eval_frame._stance.stance == "default"
            and eval_frame._stance.backend is None
            and not is_in_torch_dispatch_mode()
            and not torch._C._is_tracing()
            and not _is_counted()
        )

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], graph: CapturedGraph) -> None:
        """A call like this one ran ``graph`` through Dynamo, and returned: let the next one like it do without."""
        if graph in self.reasons:
            return
        known = self._of_graph.get(graph)
        if known is not None and known.is_current:  # something else was in the way, or it had to make room
            self._known = (known, *(each for each in self._known if each is not known))[:_TRIED]
            return
        model = self._model()
        forward = model.forward if model is not None else None
        if model is None or not isinstance(forward, types.MethodType) or forward.__self__ is not model:
            return  # its forward was replaced, as offloading does
        function = forward.__func__
        if not isinstance(function, types.FunctionType):
            return
        if function is not self._function:
            self._function, self._binder, self._known = function, Binder(function), ()
            self._of_graph.clear()
        assert self._binder is not None
        scope = self._binder((model, *args), kwargs)
        if scope is None:
            return
        state = {id(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
        if not state.isdisjoint(map(id, _tensors(scope.values()))):
            return  # which of the two a graph was captured with, Dynamo does not always guard
        changes = 0 if known is None or known.taken else self._changes[graph] + 1
        self._changes[graph] = changes
        self._forget(graph)
        try:
            if changes > PATIENCE:
                raise Refused("the model keeps changing")
            found = [*_compiled_by_dynamo(function), *(self.loaded() if self.loaded is not None else ())]
            shortcut = _make(graph, scope, model, function, found, self._run)
        except Exception as error:  # a torch whose guards are otherwise must not keep a model from running
            why = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            logger.info("all guards are checked at every call: %s", why)
            self.reasons[graph] = why
            return
        if shortcut.compiled.manager.check(scope) and shortcut.fits(scope):
            self._of_graph[graph] = shortcut
            self._known = (shortcut, *self._known)[:_TRIED]

    def clear(self) -> None:
        """Let go of all of them, and of the parts of the model that they hold."""
        self._known = ()
        self._of_graph.clear()
        self.loaded = None

    def _forget(self, graph: CapturedGraph) -> None:
        known = self._of_graph.pop(graph, None)
        self._known = tuple(each for each in self._known if each is not known)


def _make(
    graph: CapturedGraph,
    scope: Mapping[str, Any],
    model: nn.Module,
    function: types.FunctionType,
    found: Iterable[Compiled],
    run: _Run,
) -> _Shortcut:
    """The shortcut to the one of ``found`` that was compiled around ``graph``, which ``run`` runs.

    Raises:
        Refused: there is none.
    """
    for compiled in found:
        code = compiled.code
        called = [name for name in code.co_names if name.startswith("__compiled_fn")]
        if len(called) != 1 or any(name.startswith("__resume_at") for name in code.co_names):
            continue
        if getattr(compiled.names.get(called[0]), "graph", None) is not graph:
            continue
        value_of = look_up(compiled.manager, scope, function)
        rest, watch = divide(compiled.manager.root, value_of, model)
        try:
            code = without_fetching(
                code, called[0], graph.sources, value_of, watch.sources, functools.partial(run, graph)
            )
        except NotFound as why:
            logger.info("parameters are fetched at every call: %s", why)
        closure = function.__closure__ if code.co_freevars else None
        made = types.FunctionType(code, compiled.names, function.__name__, function.__defaults__, closure)
        made.__kwdefaults__ = function.__kwdefaults__
        return _Shortcut(compiled, rest, watch, made)
    raise Refused("Dynamo did not capture the forward as one graph")
