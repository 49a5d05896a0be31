"""What the rewritten graphs cost and save in one step, against the compiled model and against the ideal.

Six contenders, same weights and inputs, taking turns in one process: the eager model, ``torch.compile``, dqar_fx with
nothing reused, with everything computed and stored, with everything reused, and the *ideal*: a compiled model whose
attention modules return a constant (what reuse would cost if the cache cost nothing).

    python bench/overhead.py                       # both models, on the CPU
    python bench/overhead.py --device cuda --rounds 100
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

import dqar_fx

#: The kernel-bound model spends its time in kernels, the host-bound one in Python and launches.
MODELS = {
    "kernel": {"layers": 6, "heads": 6, "head_dim": 64, "size": 32, "batch": 2},
    "host": {"layers": 28, "heads": 1, "head_dim": 16, "size": 4, "batch": 2},
}
#: Two cases of one model.
TOGETHER = ("all computed + stored", "all reused")
COLUMNS = (
    "model", "case", "median_ms", "iqr_ms", "vs_compile", "vs_ideal", "compile_s", "peak_mib", "cache_kib",
    "rel_l2_error", "runs",
)  # fmt: skip


def build(layers: int, heads: int, head_dim: int, size: int, batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A random DiT (patch 2) and its inputs; adaLN's gates are made non-zero, or attention would not matter."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=size, patch_size=2, num_embeds_ada_norm=10,
    ).eval().requires_grad_(False)  # fmt: skip
    inputs = {"hidden_states": torch.randn(batch, 4, size, size), "class_labels": torch.arange(batch) % 10}
    return model, inputs


def with_constant_attention(model: nn.Module, calls: Callable[[nn.Module], Any]) -> nn.Module:
    """The model with each attention module returning what it returned once."""
    for module in [m for m in model.modules() if type(m).__name__ == "Attention"]:
        seen: list[torch.Tensor] = []
        handle = module.register_forward_hook(appending_to(seen))
        calls(model)
        handle.remove()
        module.register_buffer("constant", seen[0].clone())
        module.forward = returning_constant(module)
    return model


def appending_to(seen: list[torch.Tensor]) -> Callable[..., None]:
    """A forward hook that appends what its module returned."""

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        seen.append(output)

    return hook


def returning_constant(module: nn.Module) -> Callable[..., Any]:
    """A forward that returns the module's buffer ``constant``, whatever it is given."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return module.constant

    return forward


def in_bursts(
    calls: dict[str, Callable[[], torch.Tensor]], rounds: int, burst: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of the calls, which take turns: each ``burst`` times in a row.

    Once each, all find the processor's caches full of the others'; in longer bursts, of their own, as in a generation.
    The two cases of one model, which compute and reuse at every other step, take turns within theirs.
    """
    times: dict[str, list[float]] = {case: [] for case in calls}
    groups = [[case] for case in calls if case not in TOGETHER] + [list(TOGETHER)]
    for done in range(0, rounds, burst):
        for group in groups:
            for _ in range(min(burst, rounds - done)):
                for case in group:
                    times[case].append(common.timed(calls[case], device))
    return times


def measure(
    name: str, rounds: int, burst: int, device: torch.device, dtype: torch.dtype, cache: dqar_fx.CacheConfig
) -> list[dict[str, Any]]:
    """One row for each contender, all of them on the model called ``name``."""
    shape = MODELS[name]
    model, inputs = build(**shape)
    model.to(device, dtype)
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    batch, steps = shape["batch"], 2 * (rounds + 12)
    timesteps = [torch.full((batch,), 10 * (steps - i), device=device) for i in range(steps)]

    def call(module: nn.Module, step: int = 0) -> torch.Tensor:
        with torch.no_grad():
            return module(inputs["hidden_states"], timestep=timesteps[step], class_labels=inputs["class_labels"]).sample

    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True)
    ideal = with_constant_attention(copy.deepcopy(model), call)
    ideal.compile(fullgraph=True)
    none = dqar_fx.optimize(copy.deepcopy(model), dqar_fx.Schedule.none(steps), cache=cache, fullgraph=True)
    # Even steps compute and store, odd steps reuse.
    reusing = dqar_fx.optimize(
        copy.deepcopy(model), dqar_fx.Schedule.interval(steps, every=2, warmup=1), cache=cache, fullgraph=True
    )
    step_of: dict[str, int] = {"none": -1, "reusing": -1}

    def next_step(module: nn.Module, key: str) -> torch.Tensor:
        step_of[key] += 1
        return call(module, step_of[key])

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "eager": lambda: call(model),
        "torch.compile": lambda: call(compiled),
        "nothing reused": lambda: next_step(none, "none"),
        "all computed + stored": lambda: next_step(reusing, "reusing"),
        "all reused": lambda: next_step(reusing, "reusing"),
        "ideal": lambda: call(ideal),
    }
    compile_seconds: dict[str, float] = {}
    for case, function in calls.items():
        started = time.perf_counter()
        function()
        compile_seconds[case] = time.perf_counter() - started
    for _ in range(3):
        for function in calls.values():
            function()
    times = in_bursts(calls, rounds, burst, device)
    peaks = {case: common.peak_mib(function, device) for case, function in calls.items()}
    reference = call(model, 0)
    errors: dict[str, float | None] = {
        "torch.compile": common.relative_error(call(compiled), reference),
        "nothing reused": common.relative_error(call(none, 0), reference),
        "all computed + stored": common.relative_error(call(reusing, 0), reference),
    }
    # The same timestep as the store: what is left is the quantisation of the cache alone.
    with dqar_fx.runtime(reusing).generation(2):
        dqar_fx.runtime(reusing).begin_step(0)
        call(reusing, 0)
        dqar_fx.runtime(reusing).begin_step(1)
        errors["all reused"] = common.relative_error(call(reusing, 0), reference)
        cache_kib = dqar_fx.runtime(reusing).stats.cache_bytes / 1024
    base, best = common.median(times["torch.compile"]), common.median(times["ideal"])
    return [
        {
            "case": case, "model": f"{name}: DiT {shape['layers']} x {shape['heads'] * shape['head_dim']}, "
            f"{batch} x {(shape['size'] // 2) ** 2} tokens",
            "shape": list(inputs["hidden_states"].shape), "dtype": str(dtype), "steps": steps,
            "reused": case == "all reused", "median_ms": common.median(times[case]),
            "iqr_ms": common.interquartile(times[case]), "runs": rounds, "burst": burst,
            "compile_s": round(compile_seconds[case], 2),
            "vs_compile": common.median(times[case]) / base, "vs_ideal": common.median(times[case]) / best,
            "peak_mib": peaks[case], "cache_kib": cache_kib if case in ("all reused", "all computed + stored") else 0.0,
            "rel_l2_error": errors.get(case),
        }
        for case in calls
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure the models asked for, write the records, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each contender")
    parser.add_argument("--burst", type=int, default=1, help="calls of one contender before the next one's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--cache", default="int8", help="int8, native, int8:channel, ...")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "overhead.jsonl")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows = []
    for name in args.models:
        torch._dynamo.reset()
        rows += measure(
            name, args.rounds, args.burst, device, getattr(torch, args.dtype), dqar_fx.CacheConfig.parse(args.cache)
        )
    common.finish(rows, COLUMNS, device, args.output)


if __name__ == "__main__":
    main()
