"""What balancing would do for a model with its own weights: the numbers of ``dqar-fx explain --calibrate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqar_fx.balance import Balance
from dqar_fx.balance_calibration import MODES, Error, calibrate_balance, decibels, measure_balance
from dqar_fx.config import CacheConfig
from dqar_fx.errors import CaptureError
from dqar_fx.example_inputs import example_inputs
from dqar_fx.explanation import read_class
from dqar_fx.runtime.identity import timestep_argument

#: Steps of each of the two runs: enough to see how saliences change along the way.
STEPS = 10
#: What is compared beside the cache that was asked for.
LAYOUTS = ("int8:token", "int8:head", "int8:tensor", "int8:channel", "int4:token", "int4:group32")
#: For both runs; the first calibrates, the second, of other noise, is measured.
SEEDS = (0, 1)


def explain_balance(
    name: str, cache: CacheConfig, *, dtype: torch.dtype = torch.bfloat16, sizes: Mapping[str, int | None] | None = None
) -> tuple[dict[str, Any], Balance]:
    """Calibrate a balance for a model, and measure what it and dynamic balancing do to the quantisation error.

    Args:
        name: of a model that has weights: ``"digits"``, a folder, or a hub id.
        cache: what is stored; its own balance, if it has one, makes no difference.
        dtype: what the model computes in.
        sizes: of its inputs, see ``example_inputs``.

    Returns:
        Numbers, strings, lists and dicts; and the balance. ``relative_error`` is L2 over all calls; of several sites
        it is the root of their mean square. ``sqnr_db`` is the same in dB, None where there is no error.

    Raises:
        DqarError: the model is unknown, has no weights, or cannot be captured or balanced.
    """
    asked = replace(cache, balance=None)
    prefix = "kv:" if cache.target == "kv" else ""
    caches = list({str(c): c for c in (asked, *(CacheConfig.parse(prefix + layout) for layout in LAYOUTS))}.values())
    if asked.dtypes[0] == "native":
        caches.remove(asked)  # exact: there is no error to tell of
    model, run, how = _real_model(name, dtype, dict(sizes or {}))
    balance = calibrate_balance(model, lambda: run(SEEDS[0]), cache.target)
    errors = measure_balance(model, lambda: run(SEEDS[1]), caches, balance)
    rows = [
        {"cache": text, "mode": mode, "site": site, "of": what, **_told(error.relative)}
        for text, modes in errors.items()
        for mode, by_site in modes.items()
        for site, whats in by_site.items()
        for what, error in whats.items()
    ]
    totals = [
        {"cache": text, "mode": mode, "of": what, **_told(_together(by_site, what))}
        for text, modes in errors.items()
        for mode, by_site in modes.items()
        for what in ("value", "attention")
        if any(what in whats for whats in by_site.values())
    ]
    balanced = {name.rpartition("/")[0] for name in balance.factors}
    found = {
        "cache": str(asked),
        "of": "keys" if cache.target == "kv" else "outputs",
        "inputs": how,
        "calls": balance.steps,
        "sites": rows,
        "total": totals,
        "compared": [str(c) for c in caches],
        "modes": list(MODES),
        "unbalanced": sorted({site for modes in errors.values() for site in modes["plain"]} - balanced),
    }
    return found, balance


def _together(by_site: Mapping[str, Mapping[str, Error]], what: str) -> float:
    found = [whats[what].relative for whats in by_site.values() if what in whats]
    return math.sqrt(sum(error**2 for error in found) / len(found))


def _told(relative: float) -> dict[str, float | None]:
    return {"relative_error": relative, "sqnr_db": decibels(relative)}


def _real_model(
    name: str, dtype: torch.dtype, sizes: Mapping[str, Any]
) -> tuple[nn.Module, Callable[[int], object], str]:
    """A model with its weights, what runs it for a seed, and what it is run with, in words."""
    if name == "digits":
        from dqar_fx import digits

        model: nn.Module = digits.load(dtype=dtype)
        how = f"{STEPS} DDIM steps of its own, ten digits with guidance"
        return model, lambda seed: digits.sample(model, classes=range(10), seed=seed, num_steps=STEPS), how
    model = _load(name, dtype)
    inputs = example_inputs(model, **sizes)
    how = (
        f"random latents and prompts at {STEPS} timesteps: that is no generation, whose latents may have other "
        f"salient channels; calibrate_balance(model, run) takes one"
    )
    return model, lambda seed: _run(model, inputs, seed), how


def require_weights(name: str) -> None:
    """Refuse what can be seen to name no weights.

    Raises:
        CaptureError: the name of a class, or a config file.
    """
    path = Path(name).expanduser()
    if name != "digits" and (path.is_file() or (not path.is_dir() and "/" not in name)):
        raise CaptureError(
            f"--calibrate runs a model with its own weights, and {name!r} names none: random ones have no salient "
            f"channels. Give a folder that holds them, a hub id (owner/name), or 'digits'."
        )


def _load(name: str, dtype: torch.dtype) -> nn.Module:
    require_weights(name)
    kind, path = read_class(name), Path(name).expanduser()
    inner = (path / "transformer").is_dir() if path.is_dir() else None
    failures: list[Exception] = []
    places: Sequence[str | None] = ["transformer", None] if inner is None else ["transformer"] if inner else [None]
    for subfolder in places:
        try:
            model: nn.Module = kind.from_pretrained(str(path) if path.is_dir() else name, subfolder=subfolder)
        except (OSError, ValueError, RuntimeError) as error:  # noqa: PERF203  # two places are looked at, not many
            failures.append(error)
        else:
            return nn.Module.to(model.eval().requires_grad_(False), dtype=dtype)
    raise CaptureError(f"{name}: its weights cannot be loaded: {failures[0]}") from failures[0]


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    argument = timestep_argument(list(inputs))
    latents = next(iter(inputs))
    for time in _timesteps(inputs[argument[0]] if argument else None):
        noise = torch.randn(inputs[latents].shape, generator=generator).to(inputs[latents])
        model(**{**inputs, latents: noise, **({argument[0]: time} if argument else {})})


def _timesteps(example: object) -> Iterator[object]:
    """From pure noise on: whole numbers below 1000, or fractions of 1, as the example is."""
    for step in range(STEPS):
        left = 1 - step / STEPS
        if not isinstance(example, torch.Tensor):
            yield example
        elif example.is_floating_point():
            yield torch.full_like(example, left)
        else:
            yield torch.full_like(example, int(999 * left))
