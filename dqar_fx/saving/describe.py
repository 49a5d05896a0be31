"""Python objects as text that means the same in another process: what two processes compare, in place of identities."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, slice)
_TORCH = (
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)  # fmt: skip
#: Functions that are part of a class or of C, and told by their name.
_BUILT_IN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
    types.ClassMethodDescriptorType, np.ufunc,
)  # fmt: skip
_CACHED = type(functools.lru_cache(lambda: None))
_CALLABLES = (types.FunctionType, types.MethodType, types.CodeType, _CACHED, *_BUILT_IN)
#: What Python notes down for a class as it goes.
_UNTOLD = frozenset({"__doc__", "__annotations__", "__annotate__", "__abstractmethods__", "__static_attributes__"})
#: Containers within containers that are looked into; none that a forward reads is deeper.
_DEPTH = 6


def name_of(kind: Any) -> str:
    """Module and qualified name of a class or a function."""
    name = getattr(kind, "__qualname__", None) or kind.__name__
    return f"{getattr(kind, '__module__', None)}.{name}"


def is_opaque(value: object) -> bool:
    """True for an object of which ``describe`` tells the class only."""
    return not isinstance(
        value,
        (
            *_PLAIN, *_TORCH, *_CALLABLES, Tensor, nn.Module, type, types.ModuleType, enum.Enum, list, tuple, set,
            frozenset, Mapping,
        ),
    )  # fmt: skip


def describe(value: object, depth: int = _DEPTH) -> str:
    """What can be told of ``value`` in any process: plain data by value, code by its bytes, tensors by their looks.

    Modules and other objects are told by their class alone; so is what lies deeper than ``depth`` containers.
    """
    kind = name_of(type(value)).removeprefix("builtins.")
    if isinstance(value, enum.Enum):
        return f"{kind}.{value.name}"
    if isinstance(value, (*_PLAIN, *_TORCH)):
        return f"{kind} {value!r}"
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, type):
        return f"class {name_of(value)}"
    if isinstance(value, types.MethodType):
        return f"method {describe(value.__func__)} of {name_of(type(value.__self__))}"
    if isinstance(value, types.FunctionType):
        return f"function {name_of(value)} {code_digest(value.__code__)}"
    if isinstance(value, types.CodeType):
        return f"code {value.co_name} {code_digest(value)}"
    if isinstance(value, _BUILT_IN):
        return f"builtin {name_of(value)}"
    if isinstance(value, _CACHED):
        return f"cached {describe(value.__wrapped__)}"
    if depth and isinstance(value, Mapping):
        items = (f"{describe(k, depth - 1)}: {describe(v, depth - 1)}" for k, v in value.items())
        return f"{kind} {{{', '.join(items)}}}"
    if depth and isinstance(value, (set, frozenset)):
        return f"{kind} {{{', '.join(sorted(describe(v, depth - 1) for v in value))}}}"  # their order is random
    if depth and isinstance(value, (list, tuple)):
        return f"{kind} [{', '.join(describe(v, depth - 1) for v in value)}]"
    return kind


def describe_class(kind: type) -> str:
    """A class by its name and all that it and its bases define: methods and settings that were replaced show."""
    digest = hashlib.sha256()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        for name, value in sorted(vars(base).items()):
            inner: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            while hasattr(inner, "__wrapped__"):
                digest.update(f"{name} {describe(inner)};".encode())
                inner = inner.__wrapped__
            if not is_opaque(inner) and name not in _UNTOLD:
                digest.update(f"{name} {describe(inner)};".encode())
    return f"{name_of(kind)} {digest.hexdigest()[:16]}"


def code_digest(code: types.CodeType) -> str:
    """A short name for what a code object does, wherever it stands."""
    digest = hashlib.sha256()
    digest.update(code.co_code)
    for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        digest.update(f"{names};".encode())
    digest.update(str((code.co_argcount, code.co_kwonlyargcount, code.co_flags)).encode())
    for constant in code.co_consts:
        digest.update(f"{describe(constant)};".encode())
    return digest.hexdigest()[:16]


def _of_tensor(value: Tensor) -> str:
    try:
        looks = (tuple(value.shape), tuple(value.stride()))
    except RuntimeError:  # sparse, or nested
        looks = (tuple(value.shape), ())
    marked = sorted(getattr(value, "_dynamo_dynamic_indices", ()))
    return (
        f"{name_of(type(value))} {looks} {value.dtype} {value.device} requires_grad={value.requires_grad} "
        f"{torch._C._dispatch_keys(value)} {marked or ''}"
    )
