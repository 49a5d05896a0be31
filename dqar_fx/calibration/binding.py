"""What a calibrated plan was made for, so that it is not taken for something else."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dqar_fx.config import CacheConfig
from dqar_fx.errors import PlanError
from dqar_fx.graph.sites import Site
from dqar_fx.plan import Plan

_SAMPLED = 64  # elements of each weight that the fingerprint reads


def fingerprint(model: nn.Module) -> str:
    """A short name for the weights: of names, shapes, and 64 elements of each, spread over it."""
    digest = hashlib.sha256()
    taken: list[torch.Tensor] = []
    with torch.no_grad():
        for name, weight in sorted(model.state_dict().items()):
            digest.update(f"{name} {list(weight.shape)};".encode())
            if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.device.type != "meta":
                flat = weight.detach().reshape(-1)
                taken.append(flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu())
    digest.update(torch.cat(taken).numpy().tobytes() if taken else b"")
    return digest.hexdigest()[:16]


def identity(model: nn.Module, scheduler: Any, cache: CacheConfig) -> dict[str, Any]:
    """What a plan is bound to."""
    return {
        "model": type(model).__name__,
        "weights": fingerprint(model),
        "scheduler": _scheduler_name(scheduler),
        "cache": str(cache),
    }


def check(plan: Plan, model: nn.Module, scheduler: Any, cache: CacheConfig) -> None:
    """Compare what a calibrated plan was made for with what it is given to.

    Warns where its error is no longer known: other weights, another scheduler, another cache.

    Raises:
        PlanError: it was made for another class of model.
    """
    record = plan.calibration
    if record is None:
        return
    made = record.get("for", {})
    if made.get("model") != type(model).__name__:
        raise PlanError(
            f"this plan was calibrated for a {made.get('model')}, and the model is a {type(model).__name__}: what may "
            f"be reused in one says nothing about the other. Calibrate this model, or give a Schedule."
        )
    now = identity(model, scheduler, cache)
    if scheduler is None:
        now["scheduler"] = made.get("scheduler")  # nothing to compare with
    differing = [f"{key} {made.get(key)}, not {now[key]}" for key in now if made.get(key) != now[key]]
    if differing:
        warnings.warn(
            f"this plan was calibrated for {'; '.join(differing)}: the error that it promises was not measured for "
            f"this. Calibrate anew to know it.",
            stacklevel=3,
        )


def shapes_of(sites: Sequence[Site]) -> list[list[list[str]]]:
    """For each site the shapes of its exits, but for the batch: of an image's size, a prompt's length."""
    return [[[str(n) for n in shape[1:]] for shape in site.shapes] for site in sites]


def check_shapes(plan: Plan, sites: Sequence[Site]) -> None:
    """Warn where a calibrated plan meets a model that is called with other sizes than it was made for."""
    made = (plan.calibration or {}).get("shapes")
    differing = (
        (here, there) for here, there in zip(shapes_of(sites), made or (), strict=False) if not _fits(here, there)
    )
    for here, there in itertools.islice(differing, 1):
        warnings.warn(
            f"this plan was calibrated at another size: an attention's result was {there} then (without the batch) and "
            f"is {here} now, and the error that it promises was not measured for that. Calibrate anew to know it.",
            stacklevel=2,
        )


def _fits(here: list[list[str]], there: list[list[str]]) -> bool:
    """True unless two sizes differ that are both known: a size that Dynamo left open may be any."""
    if [len(shape) for shape in here] != [len(shape) for shape in there]:
        return False
    sizes = [(n, m) for shapes in zip(here, there, strict=True) for n, m in zip(*shapes, strict=True)]
    return all(n == m or not (n.isdigit() and m.isdigit()) for n, m in sizes)


def _scheduler_name(scheduler: Any) -> str:
    """The class, and a short name for its settings."""
    if scheduler is None:
        return "unknown"
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    settings = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{type(scheduler).__name__} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
