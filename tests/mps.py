"""Which operators a graph calls on MPS, and what PyTorch has for each of them: read off, as there is no Mac here.

The graphs run on fake ``mps`` tensors, so every operator is that which a Mac would be asked for. What it has for it
stands in ``native_functions.yaml``, the table that PyTorch's dispatcher is generated from (it ships in torchgen).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey, NativeFunction

from dqar_fx.graph.elsewhere import pretending

#: What an operator is on MPS. COMPOSITE: written in other operators, or for every device; NONE: it raises, or runs on
#: the CPU with PYTORCH_ENABLE_MPS_FALLBACK=1.
KERNEL, COMPOSITE, NONE, FOREIGN = "MPS kernel", "composite", "CPU fallback", "not of aten"


class Records(TorchDispatchMode):
    """Collects the operators that are called, each with the dtypes of all tensors that went in or came out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[OpOverload, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.found.setdefault(func, set()).update(x.dtype for x in tensors)
        return result


def operators(function: Any, arguments: Sequence[Any]) -> dict[OpOverload, set[torch.dtype]]:
    """What ``function`` calls, given fake ``mps`` tensors."""
    mode = detect_fake_mode(arguments)
    assert mode is not None
    with torch.no_grad(), pretending("mps"), mode, Records() as records:
        function(*arguments)
    return records.found


@functools.cache
def _table() -> tuple[dict[str, NativeFunction], Any]:
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    return {str(f.func.name): f for f in parsed.native_functions}, parsed.backend_indices[DispatchKey.MPS]


def support(operator: OpOverload) -> str:
    """What PyTorch has for an operator on MPS."""
    functions, mps = _table()
    namespace, _, name = operator.name().partition("::")
    function = functions.get(name)
    if namespace != "aten" or function is None:
        return FOREIGN
    delegate = functions[str(function.structured_delegate)] if function.structured_delegate else function
    if mps.has_kernel(function) or mps.has_kernel(delegate):
        return KERNEL
    composite = (
        function.has_composite_implicit_autograd_kernel
        or function.has_composite_explicit_autograd_kernel
        or function.has_composite_explicit_autograd_non_functional_kernel
    )
    return COMPOSITE if composite else NONE


def compiled(operator: OpOverload) -> str:
    """What becomes of an operator in Inductor: Metal code, other operators first, or a call of the operator."""
    from torch._inductor import lowering
    from torch._inductor.decomposition import select_decomp_table

    packet = operator.overloadpacket
    if packet.__name__ in _PRODUCTS or operator in lowering.fallbacks or packet in lowering.fallbacks:
        return "library"
    if operator in select_decomp_table():
        return "decomposed"
    return "Metal" if operator in lowering.lowerings or packet in lowering.lowerings else "library"


#: Inductor has code of its own for some of these, for cases of no account here.
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "convolution", "_int_mm"))
