"""What a saved capture is bound to: versions, the model's structure, and the code that was traced."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import platform
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqar_fx.errors import SavedError
from dqar_fx.runtime.standin import StandIn
from dqar_fx.saving.describe import describe, describe_class, is_opaque

#: What every module has, and is told apart; state of no meaning to its forward.
_INTERNAL = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
#: What ``dataclasses`` and ``namedtuple`` write for a class follows from the class.
_GENERATED = frozenset({"__init__", "__new__", "__eq__"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


def versions(device: torch.device) -> dict[str, str]:
    """What is installed, and where the model is."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    found["torch"] = torch.__version__
    for name in ("diffusers", "transformers", "peft", "accelerate", "dqar-fx"):
        installed = importlib.metadata.distributions(name=name)
        found[name] = next((each.version for each in installed), "not installed")
    found["device"] = device.type
    if device.type == "cuda":
        found["gpu"] = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    return found


def hooked(model: nn.Module) -> str:
    """Path of the first module that has a hook of ``nn.Module``, with the hook's kind; "" if none has."""
    for name in _GLOBAL_HOOKS:
        if getattr(nn.modules.module, name, None):
            return f"all modules ({name})"
    for path, module in model.named_modules():
        for name in _HOOKS:
            if getattr(module, name, None):
                return f"{path or 'the model'} ({name})"
    return ""


def structure(model: nn.Module) -> dict[str, str]:
    """All that a forward can depend on without being told: by path, what stands there, as text.

    Classes with the code of their methods, modes, attributes (plain data by value, other objects by class and their own
    plain attributes), parameters and buffers by their looks, and which of them are one.
    """
    found: dict[str, str] = {}
    classes: dict[type, str] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        at = path or "(model)"
        kind = type(module)
        if kind not in classes:
            classes[kind] = describe_class(kind)
        found[at] = f"{classes[kind]} {'training' if module.training else 'eval'}"
        if first.setdefault(id(module), at) != at:
            found[at] += f", which is {first[id(module)]}"
            continue
        for name, value in vars(module).items():
            if name not in _INTERNAL and not isinstance(value, StandIn):
                found[f"{at}.{name}"] = _attribute(value)
        for kinds in (module._parameters, module._buffers):
            for name, state in kinds.items():
                key = f"{path}.{name}" if path else name
                found[key] = describe(state)
                if state is not None and first.setdefault(id(state), key) != key:
                    found[key] += f", which is {first[id(state)]}"
    return found


def difference(made: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first thing that two structures (or sets of versions) differ in, in words; "" if they are equal."""
    for key in (*made, *now):
        if made.get(key) != now.get(key):
            return f"{key} was {made.get(key, 'not there')}, and is {now.get(key, 'not there')}"
    return ""


def sources(codes: Iterable[types.CodeType], model: nn.Module) -> dict[str, str]:
    """The files of all code that was traced, and of the model's classes: names of modules, and digests.

    Raises:
        SavedError: code that is in no file, so that nobody could tell if it is still the same.
    """
    modules: dict[str, types.ModuleType] = {}
    for code in codes:
        if code.co_filename == "<string>" and code.co_name in _GENERATED:
            continue
        found = inspect.getmodule(code)
        if found is None:
            raise SavedError(
                f"the model runs {code.co_name}, which is in no module ({code.co_filename}): another process could not "
                f"tell whether it is still the same. Put it into a file."
            )
        modules[found.__name__] = found
    for kind in {type(m) for m in model.modules()}:
        for base in kind.__mro__:
            modules[base.__module__] = sys.modules[base.__module__]
    outside = {n: m for n, m in modules.items() if not (n == "torch" or n.startswith("torch.") or n == "builtins")}
    return {name: _digest(module) for name, module in sorted(outside.items())}


def changed_source(made: Mapping[str, str]) -> str:
    """What of the code that was traced is no longer the same, in words; "" if all is."""
    for name, digest in made.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            return f"module {name} cannot be imported ({error})"
        if _digest(module) != digest:
            return f"the code of module {name} is another"
    return ""


def _digest(module: types.ModuleType) -> str:
    path = getattr(module, "__file__", None)
    if path is None:
        if module.__name__ in sys.builtin_module_names:
            return "built in"
        raise SavedError(
            f"the model runs code of module {module.__name__}, which is in no file: another process could not tell "
            f"whether it is still the same. Put it into a file."
        )
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _attribute(value: object) -> str:
    """An attribute of a module; a container without what diffusers notes down for itself."""
    if isinstance(value, Mapping):  # diffusers' configuration: where it was loaded from has no meaning for the graph
        return describe({k: v for k, v in value.items() if not (isinstance(k, str) and k.startswith("_"))})
    if isinstance(value, (list, tuple)) and any(is_opaque(v) for v in value):
        return f"{describe(value)} {[list(_own(v)) for v in value]}"
    return " ".join((describe(value), *_own(value)))


def _own(value: object) -> Iterator[str]:
    """The attributes of an object that is neither plain data nor a module."""
    state: Any = getattr(value, "__dict__", {})
    if is_opaque(value) and isinstance(state, dict):
        yield from (f"{name}={describe(each)}" for name, each in state.items())
