"""``dqar-fx bench MODEL``: what reuse brings a model on this machine, in milliseconds; ``--tune``: site by site."""

from __future__ import annotations

import argparse
import datetime as dt
import json
from pathlib import Path
from typing import Any

HELP = "time a model: eager, torch.compile, dqar_fx with nothing reused and with a schedule; --tune: site by site"
ROUNDS = 20
PHASES = 4  # at most so many things are told of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    from dqar_fx.cli.explain import add_call_arguments

    add_call_arguments(parser, dtype=None)
    parser.add_argument(
        "--tune", action="store_true",
        help="time every attention too, and let only those reuse whose reuse pays; prints which these are",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument(
        "--backend", default="inductor", metavar="NAME", help="as for torch.compile (default: %(default)s)"
    )
    parser.add_argument("--mode", metavar="NAME", help="as for torch.compile: max-autotune, reduce-overhead, ...")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"how often (default: {ROUNDS})")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--json", type=Path, default=Path("dqar-bench.json"), metavar="FILE",
        help="where to write the numbers (default: dqar-bench.json)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the file.

    Raises:
        DqarError: the model is unknown or cannot be captured, it has no attention, or an argument has no meaning.
    """
    import torch

    from dqar_fx.cli.explain import sizes_of
    from dqar_fx.cli.measuring import machine, versions
    from dqar_fx.cli.models import CommandError, parse_schedule, pick_device
    from dqar_fx.cli.terminal import bar, say
    from dqar_fx.config import CacheConfig
    from dqar_fx.example_inputs import example_inputs
    from dqar_fx.explanation import build_model, read_config
    from dqar_fx.graph.inspect import describe
    from dqar_fx.tune import compare
    from dqar_fx.tuning.measure import Settings

    if args.threads is not None:
        if args.threads < 1:
            raise CommandError(f"--threads {args.threads}: give at least 1.")
        torch.set_num_threads(args.threads)
    schedule, cache = parse_schedule(args.schedule, args.steps), CacheConfig.parse(args.cache)
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = build_model(args.model, read_config(args.config) if args.config else {}, device, dtype)
    inputs = example_inputs(model, **sizes_of(args))
    with bar(PHASES) as progress:

        def tell(text: str) -> None:
            progress.tell(text)
            progress.advance()

        settings = Settings(cache=cache, backend=args.backend, mode=args.mode, options=None, dynamic=None)
        tuning = compare(model, inputs, schedule, settings, rounds=args.rounds, tell=tell, choose=args.tune, eager=True)
    parameters = sum(p.numel() for p in model.parameters())
    record: dict[str, Any] = {
        "name": args.model,
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "inputs": describe(inputs),
        "backend": args.backend,
        "mode": args.mode,
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        **tuning.to_dict(),
    }
    args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"{args.model}: {parameters / 1e6:.1f} M parameters (random ones: speed does not depend on them), {dtype}")
    say(f"called with {record['inputs']}, on {record['machine']['device_name']}")
    say(str(tuning))
    if not tuning.pays:
        say("reuse does not pay here at all: leave the model to torch.compile.")
    say(f"All numbers: {args.json}")
    return 0
