"""How a compiled piece is called: as directly as is sound, since a step calls dozens of them.

AOTAutograd puts a function around what Inductor compiled that prepares the arguments and puts the results right, and
Inductor another that serves its caches, its profiler and its records of the first call. For most pieces nothing is left
to do after the first call; on the host, both together take as long as a small kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from torch._inductor.output_code import CompiledFxGraph

#: Takes a list of arguments, which it may empty, and returns the outputs.
BoxedCallable = Callable[[list[Any]], Sequence[Any]]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: How many functions deep Inductor's own code may lie.
_DEPTH = 12


def boxed(function: Callable[..., Any]) -> BoxedCallable:
    """``function(*arguments)`` as a callable of one list of arguments.

    What AOTAutograd compiles takes a list that it empties, so that an argument is freed as soon as it is not needed;
    what it hands out wraps that in a function of ``*args``, which keeps every argument alive until the end (and costs
    twice the host time). Take the inner one where there is one; functions that take ``*args`` are told by their code.
    """
    inner: Any = function
    while True:
        if inspect.isfunction(inner) and inner.__code__.co_flags & inspect.CO_VARARGS:
            inner = inner.__dict__.get("__wrapped__")
        elif _is_cached(inner):
            inner = inner.compiled_fn
        else:
            break
    if inspect.isfunction(inner) and inner.__code__.co_argcount == 1 and getattr(inner, "_boxed_call", False):
        return inner
    return lambda arguments: function(*arguments)


def direct(function: Callable[..., Any], results: int) -> BoxedCallable | None:
    """The code that Inductor generated for ``function``, without what is around it; None where it is not found.

    Only for what ``needs_nothing_around``, and after the first call, at which Inductor finishes what it keeps on disk.
    ``results``: how many there must be. A graph that returns more leaves it to others to take some away.
    """
    found = list(_generated(function, _DEPTH, set()))
    if len(found) != 1 or found[0].output_strides is None or len(found[0].output_strides) != results:
        return None
    return found[0].current_callable


def _generated(value: Any, depth: int, seen: set[int]) -> Iterator[CompiledFxGraph]:
    """What Inductor compiled that ``value``, a function, or those that it calls, hold."""
    from torch._inductor.output_code import CompiledFxGraph  # takes a while, and is loaded by now if it is needed

    if id(value) in seen or not depth:
        return
    seen.add(id(value))
    if isinstance(value, CompiledFxGraph):
        yield value
    elif _is_cached(value):
        yield from _generated(value.compiled_fn, depth - 1, seen)
    elif inspect.isfunction(value):
        for cell in value.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            yield from _generated(held, depth - 1, seen)
        yield from _generated(value.__dict__.get("__wrapped__"), depth - 1, seen)


def _is_cached(value: object) -> bool:
    """True for the object that AOTAutograd puts around what it can keep on disk. (By name: it is not public.)"""
    return type(value).__name__ == "SerializableCompiledFunction"


def needs_nothing_around(gm: fx.GraphModule, arguments: Sequence[Any], may_write: int) -> bool:
    """True if generated code for ``gm`` itself returns what ``gm`` returns, and that is all it does.

    Not so for tensor subclasses, which are taken apart; for the same tensor twice, which is given once; under autocast,
    which is switched off inside; where a result is (a view of) an argument or of another result, which is made anew; or
    where an argument is written into, whose version is counted: all but the last ones, from ``may_write`` on, which are
    the cache's and whose version nobody asks for.
    """
    if any(type(argument) not in _PLAIN for argument in arguments) or len({*map(id, arguments)}) != len(arguments):
        return False
    if any(torch.is_autocast_enabled(kind) for kind in {"cpu", *(argument.device.type for argument in arguments)}):
        return False
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), FakeTensorMode():
            given = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device) for a in arguments]
            before = [tensor._version for tensor in given[:may_write]]
            results = gm.forward(*given)
            if before != [tensor._version for tensor in given[:may_write]]:
                return False
            places = [tensor.untyped_storage()._cdata for tensor in (*given, *results)]
    except Exception:  # whatever cannot be tried here is called as torch would
        return False
    made = places[len(given) :]
    return len({*made}) == len(made) and not {*made} & {*places[: len(given)]}
