"""``save_compiled`` and ``load_compiled``: what Dynamo captured, kept for the next process."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqar_fx.backend import CaptureBackend
from dqar_fx.calibration.records import write
from dqar_fx.calls import call_arguments
from dqar_fx.checks import check_model, check_parts
from dqar_fx.compiled import OptimizedCall
from dqar_fx.errors import SavedError
from dqar_fx.optimize import runtime
from dqar_fx.supported import is_older

FORMAT, VERSION = b"dqar_fx.save_compiled", 1
#: The oldest torch in which Dynamo's capture can be called by itself as it is here.
OLDEST_TORCH = "2.13"


def save_compiled(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], path: str | os.PathLike[str]) -> Path:
    """Capture ``model`` and write the capture down, so that another process need not capture it again.

    What is written is what Dynamo made of the forward (a graph of operators, and the guards under which it is valid).
    It holds no weights and no compiled code: compiled pieces come from Inductor's own cache on the disk. It does not
    depend on the schedule, the cache or the gates, so it is made once for each shape that a model is called with.

    The model is traced, once and with fixed sizes, but not run, and is left as it is. It may be optimised or not.

    The file is bound to what a capture takes for granted: the versions of Python, torch, diffusers, transformers, peft,
    accelerate and of this package; the kind of machine and device; every module of the model by class (with the code of
    its methods), mode and attributes; every parameter and buffer by shape, strides, dtype and device (never by value);
    and the files of all the code that was traced, but for torch's own.

    Args:
        model: what ``optimize`` takes, in eval mode; one graph, without hooks.
        inputs: the arguments of one call as the sampling loop will make it, by name or in order. Calls are told apart
            by shapes, strides, dtypes and devices of tensors, and by the value of anything else. The number of threads
            of torch has to be the same, too, as Dynamo guards on it.
        path: of the file; replaced at once when it is complete.

    Returns:
        The path.

    Raises:
        SavedError: the inputs are no arguments of the model; it is not one graph of fixed sizes, has hooks, or depends
            on objects that mean nothing in another process; torch is older than 2.13. Nothing is written.
        CaptureError, RuntimeStateError: as ``optimize``.
        OSError: the file cannot be written.
    """
    _check_torch()
    from dqar_fx.saving import capture as saving  # reaches deep into torch's Dynamo, as only this needs it
    from dqar_fx.saving.structure import hooked, structure, versions

    args, kwargs = call_arguments(inputs, SavedError)
    if isinstance(getattr(model, "_compiled_call_impl", None), OptimizedCall):
        check_parts(model)
    else:
        check_model(model)
    if where := hooked(model):
        raise SavedError(
            f"{where} has a hook, and hooks are not guarded by torch.compile: nobody would notice in another process "
            f"that it is missing. Remove it (handle.remove()) first."
        )
    made, looks, files = saving.make_capture(model, args, kwargs)
    body = saving.dump_capture(made)
    head = {
        "version": VERSION,
        "model": type(model).__name__,
        "versions": versions(_device(model)),
        "structure": structure(model),
        "sources": files,
        "call": looks,
    }
    rest = json.dumps(head).encode() + b"\n" + body
    data = b"\n".join((FORMAT, hashlib.sha256(rest).hexdigest().encode(), rest))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, lambda file: file.write_bytes(data))
    return target


def load_compiled(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give an optimised model the capture that ``save_compiled`` wrote, before its first call.

    The first call that looks like the saved one then does not trace (with ``sites="auto"`` it does, to measure). All
    other calls (other shapes, dtypes or devices, another mode, LoRA, other processors) are captured by
    ``torch.compile`` as ever.

    What is checked when:

    * Here: everything the file is bound to (see ``save_compiled``).
    * At the first call that looks like the saved one: the structure once more, and what each of Dynamo's guards was put
      up on, by value, class or code. If something differs, the capture is given up with a warning, and the model is
      captured anew. Then the guards are put up on the live objects.
    * At every later call: these guards, which are those that ``torch.compile`` would have made here, checked by the
      same code in the same time; whether ``forward`` was replaced; and whether a hook has been registered anywhere,
      which ``torch.compile`` does not see. What they refuse is captured anew. As with ``torch.compile``, a class or a
      function whose code is changed in place while the process runs is noticed only where a guard looks at it.

    Reading unpickles: like ``torch.load(weights_only=False)``, a file from a stranger can run anything. Load only what
    you have written yourself.

    Raises:
        SavedError: the file is damaged, no saved capture, or was made for another model, version, device or code (the
            message names what differs); the model was called before, or has hooks; torch is older than 2.13.
        RuntimeStateError: the model is not optimised.
        OSError: the file cannot be read.
    """
    _check_torch()
    from dqar_fx.saving.capture import Capture, ResumedCall
    from dqar_fx.saving.structure import changed_source, difference, hooked, structure, versions

    optimised = runtime(model)
    call = getattr(model, "_compiled_call_impl", None)
    if not isinstance(call, OptimizedCall):
        raise SavedError(
            "a saved capture is for a model that dqar_fx.optimize compiled in place, and this was made by "
            "torch.compile. Optimise the module itself."
        )
    if optimised.graphs:
        raise SavedError("the model has been captured already, by its first call. Load before that.")
    head, body = _read(Path(path))
    made_for = f"{path} was saved from a {head['model']}"
    if why := difference(head["versions"], versions(_device(model))):
        raise SavedError(f"{made_for}, and does not fit what is installed here: {why}. Save it anew.")
    made_of = structure(model)
    if why := difference(head["structure"], made_of):
        raise SavedError(f"{made_for}, and does not fit this model: {why}. Save this model's own capture.")
    if why := changed_source(head["sources"]):
        raise SavedError(f"{made_for}, but {why} now. Save it anew.")
    if where := hooked(model):
        raise SavedError(f"{made_for} without hooks, and {where} has one. Remove it, or do not load.")
    try:
        capture = pickle.loads(body)
        assert isinstance(capture, Capture)
    except Exception as error:  # what was pickled may raise anything
        raise SavedError(f"{path} cannot be read ({type(error).__name__}: {error}). Save it anew.") from error
    reference = weakref.ref(model)
    backend = CaptureBackend(optimised, delimited=True, check=lambda: check_parts(reference()))
    call.resume(lambda usual: ResumedCall(model, capture, head["call"], made_of, backend, usual))


def _check_torch() -> None:
    if is_older(torch.__version__, OLDEST_TORCH):
        raise SavedError(
            f"captures are saved and loaded with torch {OLDEST_TORCH} or newer, and torch {torch.__version__} is "
            f"installed. Upgrade it, or do without."
        )


def _device(model: nn.Module) -> torch.device:
    state = next(model.parameters(), None)
    return state.device if state is not None else torch.device("cpu")


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Head and body of a file.

    Raises:
        SavedError: it is not one of ours, of another version of the format, or not whole.
    """
    kind, _, rest = path.read_bytes().partition(b"\n")
    if kind != FORMAT:
        raise SavedError(f"{path} is no saved capture. Give the path of a file that dqar_fx.save_compiled wrote.")
    digest, _, rest = rest.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        raise SavedError(f"{path} is damaged: it is not as it was written. Save it anew.")
    line, _, body = rest.partition(b"\n")
    head = json.loads(line)
    if head["version"] != VERSION:
        raise SavedError(
            f"{path} is of version {head['version']} of the format, and this dqar_fx reads {VERSION}. Save it anew."
        )
    return head, body
