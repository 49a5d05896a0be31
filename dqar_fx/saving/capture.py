"""One capture of a model's forward, apart from the model: made here, run where it is loaded."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import inspect
import itertools
import pickle
import secrets
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import bytecode_transformation, convert_frame, eval_frame
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.package import SerializedCode
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
from torch._guards import CompileContext, compile_context
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode
from torch.utils.hooks import RemovableHandle

from dqar_fx.backend import CaptureBackend
from dqar_fx.errors import SavedError
from dqar_fx.saving import guards
from dqar_fx.saving.describe import describe
from dqar_fx.saving.graph import dump_graph, load_graph, same_graph
from dqar_fx.saving.structure import difference, hooked, sources, structure
from dqar_fx.shortcut.call import Compiled


@dataclass(frozen=True)
class Capture:
    """What Dynamo made of a model's forward, less the model.

    Attributes:
        graph: see ``saving.graph``.
        guards: see ``saving.guards``.
        code: what calls the graph and puts its results where the model would return them.
        backend: the name under which that code calls the graph.
        imports: Dynamo's names for modules, which guards begin with, and the modules.
        modules: names that the code uses besides, and the modules behind them.
        objects: names that it uses, and the module and qualified name of what is behind them.
        builtins_name: the name under which guards look for what is built into Python.
    """

    graph: bytes
    guards: guards.GuardRecord
    code: SerializedCode
    backend: str
    imports: Mapping[str, str]
    modules: Mapping[str, str]
    objects: Mapping[str, tuple[str, str]]
    builtins_name: str | None


def forward_of(model: nn.Module) -> types.FunctionType:
    """The function behind ``model.forward``.

    Raises:
        SavedError: it is none (a partial, as hooks put it there).
    """
    forward = model.forward
    if not isinstance(forward, types.MethodType) or forward.__self__ is not model:
        raise SavedError(
            f"the forward of this {type(model).__name__} was replaced by a {type(forward).__name__} (as offloading "
            f"does), and that cannot be saved. Save, or load, before that is put on."
        )
    function = forward.__func__
    if not isinstance(function, types.FunctionType):
        raise SavedError(f"the forward of this {type(model).__name__} is no Python function, but {function!r}.")
    return function


def signature_of(function: types.FunctionType) -> inspect.Signature:
    """Of the function itself, where it wraps another one: its local variables are what Dynamo's guards begin with."""
    return inspect.signature(function, follow_wrapped=False)


def arguments_of(function: types.FunctionType, model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The local variables that a call of ``function`` begins with.

    Raises:
        TypeError: it does not take these arguments.
    """
    bound = signature_of(function).bind(model, *args, **kwargs)
    bound.apply_defaults()
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {**{name: cell.cell_contents for name, cell in cells}, **bound.arguments}


def looks_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """What the arguments of a call look like: tensors by shape, dtype and device, numbers by value."""
    return {name: describe(value) for name, value in scope.items() if not isinstance(value, nn.Module)}


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """What Dynamo has around a compilation."""
    with (
        get_metrics_context(),
        dynamo_timed("dqar_fx.saving"),
        torch_function_mode_stack_state_mgr,
        compile_context(CompileContext(convert_frame.get_compile_id({}))),
    ):
        yield


@contextlib.contextmanager
def _names_of_its_own() -> Iterator[None]:
    """Dynamo numbers the names that it adds to the forward's globals from 0: those of another process would clash."""
    before = bytecode_transformation._unique_id_counter
    bytecode_transformation._unique_id_counter = itertools.count(secrets.randbits(60))
    try:
        yield
    finally:
        bytecode_transformation._unique_id_counter = before


def make_capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Capture, dict[str, str], dict[str, str]]:
    """Capture ``model`` as its first call would, but for open sizes; and the looks of the call, and the code's files.

    Raises:
        SavedError: it cannot be saved.
    """
    function = forward_of(model)
    try:
        scope = arguments_of(function, model, args, kwargs)
    except TypeError as error:
        raise SavedError(f"inputs do not fit the forward of {type(model).__name__}: {error}.") from error
    settings = {
        "automatic_dynamic_shapes": False, "assume_static_by_default": True, "capture_dynamic_output_shape_ops": True,
        "capture_scalar_outputs": True,
    }  # fmt: skip
    with torch.no_grad(), torch._dynamo.config.patch(settings), _names_of_its_own(), compiling():
        try:
            captured = convert_frame.fullgraph_capture(model.forward, args, kwargs)
        except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
            raise SavedError(
                f"{type(model).__name__} cannot be captured as one graph with these inputs, and others cannot be "
                f"saved: {str(error).strip().splitlines()[0]}"
            ) from error
        out, given = captured.graph_capture_output, captured.backend_input
        if given is None:
            raise SavedError(f"{type(model).__name__} computes nothing with these inputs.")
        files = sources(out.traced_code, model)
        try:
            record = guards.record_guards(out, function.__code__)
        except ConstraintViolationError as error:
            raise SavedError(
                f"a size of the inputs was marked as dynamic, and only captures of fixed sizes can be saved: {error}"
            ) from error
        graph = dump_graph(given.graph_module)
        capture = _of_output(out, given.backend_id, graph, record, function)
        # What cannot be used here can be used nowhere.
        read: Capture = pickle.loads(dump_capture(capture))
        if not same_graph(load_graph(read.graph), given.graph_module):
            raise SavedError("the captured graph cannot be written down: read again, it is another.")
        try:
            manager = guards.rebuild(read.guards, function.__code__, scope, function.__globals__)
        except guards.Differs as error:
            raise SavedError(f"the guards of the capture cannot be put up again: {error}.") from error
        if not manager.guard_manager.check(scope):
            raise SavedError(
                f"the guards of the capture refuse the very call that it was made from: "
                f"{guards.refusal(manager, scope)}."
            )
    return capture, looks_of(scope), files


def dump_capture(capture: Capture) -> bytes:
    """As bytes.

    Raises:
        SavedError: something in it cannot be written.
    """
    try:
        return pickle.dumps(capture)
    except Exception as error:  # whatever the reducers of the objects in it raise
        raise SavedError(f"the capture cannot be written down: {error}.") from error


def _of_output(
    out: Any, backend: str, graph: bytes, record: guards.GuardRecord, function: types.FunctionType
) -> Capture:
    environment = out.get_runtime_env()
    modules, objects = {}, {}
    for name in environment.external_refs - environment.import_sources.keys() - {backend}:
        # Dynamo's own additions to the forward's globals begin with underscores; the others are there in any process.
        if name in vars(builtins) or (name in function.__globals__ and not name.startswith("__")):
            continue
        value = out.f_globals.get(name)
        if isinstance(value, types.ModuleType):
            modules[name] = value.__name__
        elif isinstance(value, (type, types.FunctionType)) and "<locals>" not in value.__qualname__:
            objects[name] = (value.__module__, value.__qualname__)
        else:
            raise SavedError(
                f"what the capture returns is made with an object of this process ({name}, a {type(value).__name__}). "
                f"Such a model cannot be saved."
            )
    return Capture(
        graph, record, SerializedCode.from_code_object(environment.bytecode), backend, dict(environment.import_sources),
        modules, objects, record.state["name_of_builtins_dict_key_in_fglobals"],
    )  # fmt: skip


class ResumedCall:
    """Runs a loaded capture where its guards let it, the model as ``torch.compile`` made it where they do not.

    At the first call that looks like the one that was saved, the guards are put up on the live model, and the graph
    goes to the backend as if it had just been captured. If the model has changed meanwhile, the capture is given up,
    with a warning, and the model captured anew.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        looks: Mapping[str, str],
        made_of: Mapping[str, str],
        backend: CaptureBackend,
        usual: Callable[..., Any],
    ) -> None:
        self._model = model
        self._function = forward_of(model)
        self._signature = signature_of(self._function)
        self._cells = bool(self._function.__closure__)
        self._capture: Capture | None = capture
        self._looks, self._made_of = looks, made_of
        self._backend = backend
        self._usual = usual
        self._manager: Any = None
        self._run: Callable[..., Any] | None = None
        self._handles = 0
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model, as ``torch.compile`` would make it."""
        model = self._model
        if self._capture is not None:
            with self._lock:
                self._begin(args, kwargs)
        run = self._run
        if run is not None:
            if RemovableHandle.next_id != self._handles and self._is_hooked():
                self._run = None
            elif getattr(model.forward, "__func__", None) is self._function and self._fits(args, kwargs):
                return run(model, *args, **kwargs)
        return self._usual(*args, **kwargs)

    def _fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if eval_frame._stance.stance == "force_eager" or not self._manager.valid:
            return False
        try:
            bound = self._signature.bind(self._model, *args, **kwargs)
        except TypeError:
            return False  # the model itself will say so
        bound.apply_defaults()
        scope = bound.arguments
        if self._cells:
            scope = arguments_of(self._function, self._model, args, kwargs)
        return bool(self._manager.guard_manager.check(scope))

    def compiled(self) -> Iterator[Compiled]:
        """What is called where the guards pass, once they are put up."""
        if self._run is not None:
            run: Any = self._run
            yield Compiled(run.__code__, run.__globals__, self._manager.guard_manager, self._is_valid)

    def _is_valid(self) -> bool:
        if RemovableHandle.next_id != self._handles and self._is_hooked():
            self._run = None
        return self._run is not None and bool(self._manager.valid)

    def _is_hooked(self) -> bool:
        """Somewhere a hook was registered, which no guard sees: True if it is here, and the capture of no use."""
        self._handles = RemovableHandle.next_id
        return bool(hooked(self._model))

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put up guards and graph, if this call is like the one that was saved."""
        capture = self._capture
        if capture is None or torch._C._len_torch_dispatch_stack() or eval_frame._stance.stance == "force_eager":
            return
        try:
            scope = arguments_of(self._function, self._model, args, kwargs)
        except TypeError:
            return
        if looks_of(scope) != self._looks or torch.is_grad_enabled():
            return
        try:
            why = self._changed()
            if not why:
                self._manager = _put_up(capture, self._function, scope)
                if not self._manager.guard_manager.check(scope):
                    why = guards.refusal(self._manager, scope)
        except guards.Differs as error:
            why = str(error)
        if not why:
            self._run = self._make(capture)
        self._capture = None
        if why:
            warnings.warn(
                f"the loaded capture does not fit this {type(self._model).__name__} as it is called now, so it is "
                f"captured anew: {why}",
                stacklevel=4,
            )

    def _make(self, capture: Capture) -> Callable[..., Any]:
        """What Dynamo would have put in place of the forward."""
        graph = self._backend(load_graph(capture.graph), ())
        names = {
            name: importlib.import_module(module)
            for name, module in (*capture.imports.items(), *capture.modules.items())
        }
        objects = {name: _find(*place) for name, place in capture.objects.items()}
        code, function = SerializedCode.to_code_object(capture.code), self._function
        run = types.FunctionType(
            code,
            {**function.__globals__, **names, **objects, capture.backend: graph},
            argdefs=function.__defaults__,
            closure=function.__closure__ if code.co_freevars else None,
        )
        run.__kwdefaults__ = function.__kwdefaults__
        return run

    def _changed(self) -> str:
        """What is no longer as it was when the capture was loaded."""
        self._handles = RemovableHandle.next_id
        if where := hooked(self._model):
            return f"{where} has a hook"
        return difference(self._made_of, structure(self._model))


def _put_up(capture: Capture, function: types.FunctionType, scope: dict[str, Any]) -> Any:
    """The guards, on the live model; names that Dynamo would add to the forward's globals are added as it does."""
    for name, module in capture.imports.items():
        function.__globals__.setdefault(name, importlib.import_module(module))
    if capture.builtins_name is not None:
        function.__globals__.setdefault(capture.builtins_name, vars(builtins))
    with compiling():
        return guards.rebuild(capture.guards, function.__code__, scope, function.__globals__)


def _find(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
