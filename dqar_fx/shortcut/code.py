"""The code that Dynamo put in place of a forward, less the part that fetches the model's parameters.

Before it calls the graph, that code looks up every parameter, module by module: half a millisecond for 28 blocks.
Where the model is watched, it would find the same tensors as before. So all up to the call of the graph is replaced by
a call of ours, which is given the forward's own arguments and knows the rest. What makes the model's result of the
graph's stays as it is.
"""

from __future__ import annotations

import dis
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo import bytecode_transformation as bytecode

#: Where an input of a graph comes from that is an argument of the call, or lies in one: ``L['kwargs']['timestep']``.
_ARGUMENT = re.compile(r"L\['(\w+)'\]((?:\['\w+'\]|\[\d+\])*)")
_KEY = re.compile(r"\['(\w+)'\]|\[(\d+)\]")


class NotFound(Exception):
    """The code, or what it hands to the graph, is not of the expected form."""


def without_fetching(
    code: types.CodeType,
    called: str,
    sources: Sequence[str],
    value_of: Callable[[str], object],
    watched: frozenset[str],
    run: Callable[[tuple[Any, ...]], Any],
) -> types.CodeType:
    """``code`` with the fetching left out.

    Args:
        code: Dynamo's, which calls its graph once, under the global name ``called``.
        sources: where the graph's inputs come from, in order, as Dynamo writes it.
        value_of: looks up a source.
        watched: the sources that are; those of all inputs but arguments of the call have to be.
        run: takes the graph's inputs, and returns its outputs as the graph does.

    Raises:
        NotFound: leave the code as it is.
    """
    arguments: list[tuple[int, str, tuple[str | int, ...]]] = []  # position, argument, keys on the way
    values: list[Any] = []
    for position, source in enumerate(sources):
        argument = _ARGUMENT.fullmatch(source)
        value = None if argument else value_of(source)
        if argument:
            keys = tuple(int(number) if number else key for key, number in _KEY.findall(argument[2]))
            arguments.append((position, argument[1], keys))
        elif source not in watched:
            raise NotFound(f"{source} is not watched")
        values.append(value)
    names = tuple(dict.fromkeys(name for _, name, _ in arguments))
    if not set(names) <= set(code.co_varnames) - set(code.co_cellvars):
        raise NotFound("an argument is no plain local variable")
    begin = _beginning(values, [(position, names.index(name), keys) for position, name, keys in arguments], run)

    def replace(instructions: list[bytecode.Instruction], _options: Mapping[str, Any]) -> None:
        first, last = _call_of(instructions, called)
        instructions[first:] = [
            *bytecode.add_push_null(bytecode.create_load_const(begin, checked=False)),
            *(bytecode.create_instruction("LOAD_FAST", argval=name) for name in names),
            *bytecode.create_call_function(len(names), False),
            *_after(instructions[first : last + 1], instructions[last + 1 :]),
        ]

    # Of a copy, as torch keeps what it took apart, and its own code has to be freed for what it calls to be freed.
    made: Any = bytecode.transform_code_object(code.replace(), replace)
    changed: types.CodeType = made[0] if isinstance(made, tuple) else made  # a tuple since torch 2.9
    return changed


def _beginning(
    values: Sequence[Any],
    arguments: Sequence[tuple[int, int, tuple[str | int, ...]]],
    run: Callable[[tuple[Any, ...]], Any],
) -> Callable[..., Any]:
    """A function of the call's arguments that runs the graph on them and the known ``values``."""

    def begin(*given: Any) -> Any:
        inputs = list(values)
        for position, index, keys in arguments:
            value = given[index]
            for key in keys:
                value = value[key]
            inputs[position] = value
        return run(tuple(inputs))

    return begin


def _call_of(instructions: Sequence[bytecode.Instruction], called: str) -> tuple[int, int]:
    """The instructions, first and last, that call the global ``called``, its arguments' included."""
    loads = [i for i, each in enumerate(instructions) if each.opname == "LOAD_GLOBAL" and each.argval == called]
    if len(loads) != 1:
        raise NotFound("the graph is not called once")
    first = loads[0]
    if first and instructions[first - 1].opname == "PUSH_NULL":
        first -= 1
    depth = 0
    for index in range(first, len(instructions)):
        each = instructions[index]
        if each.target is not None or each.is_jump_target or each.opcode in dis.hasjrel or each.opcode in dis.hasjabs:
            break
        depth += dis.stack_effect(each.opcode, each.arg if each.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        # What is called lies lowest, so nothing before the call itself leaves one value only.
        if depth == 1 and index > loads[0] + 1:
            if not each.opname.startswith("CALL"):
                break
            return first, index
    raise NotFound("the graph is not called in a straight line")


def _after(removed: Sequence[bytecode.Instruction], rest: Sequence[bytecode.Instruction]) -> list[bytecode.Instruction]:
    """``rest`` for when ``removed`` has not run: it does not delete what that had set, and must not use it."""
    if any(each.opname.startswith(("STORE_", "DELETE_")) and each.opname != "STORE_FAST" for each in removed):
        raise NotFound("something is written before the graph is called")
    variables = {each.argval for each in removed if each.opname == "STORE_FAST"}
    kept = [each for each in rest if each.opname != "DELETE_FAST" or each.argval not in variables]
    for each in kept:
        # Some instructions name two variables.
        named = each.argval if isinstance(each.argval, tuple) else (each.argval,)
        if "_FAST" in each.opname and not each.opname.startswith("STORE_FAST") and variables.intersection(named):
            raise NotFound(f"{each.argval} is used after the graph was called")
    return kept
