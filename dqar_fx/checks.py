"""What a model must not be before it is optimised: each refusal says what to undo."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dqar_fx.compiled import OptimizedCall
from dqar_fx.errors import CaptureError, RuntimeStateError


def check_model(model: Any) -> None:
    """Refuse a model that cannot be optimised.

    Raises:
        CaptureError: not a module, or dropout is active.
        RuntimeStateError: it, or a part of it, is compiled or optimised already, or has one of diffusers' caches.
    """
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise RuntimeStateError(
            "model was compiled with torch.compile already. Pass the module itself: model._orig_mod."
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model is a {type(model).__name__}, not an nn.Module. Pass the denoiser itself, e.g. pipe.transformer."
        )
    compiled = getattr(model, "_compiled_call_impl", None)
    if isinstance(compiled, OptimizedCall):
        raise RuntimeStateError("model is optimised already. Call dqar_fx.restore(model) first, then optimize it anew.")
    if compiled is not None:
        raise RuntimeStateError(
            "model was compiled in place with model.compile(). dqar_fx compiles it itself: set "
            "model._compiled_call_impl = None (or take a fresh model), then optimize it."
        )
    check_parts(model)
    active = _active_dropout(model)
    if active:
        raise CaptureError(
            f"model is in training mode with dropout ({active}): a stored attention would freeze it. "
            f"Call model.eval() first."
        )


def check_parts(model: nn.Module | None) -> None:
    """Refuse what was done to parts of the model and would get in the way."""
    if model is None:
        return
    config = getattr(model, "_cache_config", None)
    if config is not None:
        raise RuntimeStateError(
            f"diffusers' own cache is enabled on this model ({type(config).__name__}), and two caches would each read "
            f"what the other one skipped. Call model.disable_cache() first."
        )
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        # Of diffusers' hooks, those that keep something from call to call are caches; offloading and casting are not.
        stateful = [n for n, hook in getattr(registry, "hooks", {}).items() if getattr(hook, "_is_stateful", False)]
        if stateful:
            raise RuntimeStateError(
                f"a cache of diffusers hangs on {path or 'the model'} (hook {stateful[0]!r}), and two caches would "
                f"each read what the other one skipped. Remove it first: diffusers.hooks.HookRegistry."
                f"check_if_exists_or_initialize(model).remove_hook({stateful[0]!r}, recurse=True)."
            )
        compiled = getattr(module, "_compiled_call_impl", None)
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
            raise RuntimeStateError(
                f"{path} was compiled with torch.compile. dqar_fx compiles the whole model, equal blocks only once: "
                f"put the module itself ({path}._orig_mod) in its place first."
            )
        if path and isinstance(compiled, OptimizedCall):
            raise RuntimeStateError(f"{path} is optimised already. Call dqar_fx.restore(model.{path}) first.")
        if path and compiled is not None:
            raise RuntimeStateError(
                f"{path} was compiled by itself (compile_repeated_blocks() or {path}.compile()). dqar_fx compiles the "
                f"whole model, equal blocks only once. Undo it first: "
                f"for module in model.modules(): module._compiled_call_impl = None"
            )


def _active_dropout(model: nn.Module) -> str:
    """The first module that would drop something in its present mode, as ``path=probability``; "" if there is none."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        for name in ("p", "dropout", "dropout_p", "dropout_prob", "attn_drop", "attention_dropout"):
            if name == "p" and not isinstance(module, nn.modules.dropout._DropoutNd):
                continue
            value = vars(module).get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return f"{path or type(module).__name__}.{name}={value}"
    return ""
