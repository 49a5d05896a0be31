"""``dqar-fx explain MODEL``: what can be reused in a model, what that can save at most, and what cannot and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HELP = "show a model's attentions, what reusing them can save at most, and what cannot be reused"
DTYPES = ("bfloat16", "float16", "float32")
SCHEDULE = "taper"
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_call_arguments(parser, dtype=DTYPES[0])
    parser.add_argument("--sites", action="append", metavar="PATTERN", help="only sites whose path matches; repeatable")
    parser.add_argument(
        "--calibrate", action="store_true",
        help="run the model with its own weights, and show what balancing channels (--cache int8+balance) does to the "
        "error of what is stored",
    )  # fmt: skip
    parser.add_argument(
        "--save-balance", type=Path, metavar="FILE", help="with --calibrate: write the balance, for int8+balance=FILE"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers there")


def add_call_arguments(parser: argparse.ArgumentParser, *, dtype: str | None) -> None:
    """Those that say what model is called with what, and what would be reused; None: the dtype suits the device."""
    parser.add_argument(
        "model", metavar="MODEL",
        help="a hub id, a folder (of a transformer or of a pipeline), a config file, the name of a diffusers "
        "transformer class, or 'digits', the model that ships",
    )  # fmt: skip
    parser.add_argument("--config", metavar="JSON", help="a JSON file, or JSON text: config values to set or to change")
    parser.add_argument(
        "--schedule", default=SCHEDULE, metavar="TEXT",
        help=f"which attention reuses when, as text or as a plan saved in a .json file (default: {SCHEDULE})",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="T", help="number of sampling steps (default: the schedule's own)")
    parser.add_argument("--cache", default="int8", metavar="TEXT", help="int8 (the default), native, kv:int8, ...")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows of a call (guidance doubles images)")
    size = "of hidden_states: in latent pixels, or in tokens for a model that takes tokens"
    parser.add_argument("--size", type=int, metavar="N", help=f"height and width {size}")
    parser.add_argument("--height", type=int, metavar="H", help=f"height {size}")
    parser.add_argument("--width", type=int, metavar="W", help=f"width {size}")
    parser.add_argument("--frames", type=int, metavar="F", help="latent frames of a video")
    parser.add_argument("--text-tokens", type=int, metavar="N", help="length of the prompt")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype,
        help=f"what the model computes in (default: {dtype or 'bfloat16 on a GPU, float32 on the CPU'})",
    )  # fmt: skip


def sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sizes of a call, as ``example_inputs`` takes them."""
    return {
        "batch": args.batch,
        "height": args.height or args.size,
        "width": args.width or args.size,
        "frames": args.frames,
        "text_tokens": args.text_tokens,
    }


def run(args: argparse.Namespace) -> int:
    """Print the tables; 0 if there is something to reuse, else 1.

    Raises:
        DqarError: the model is unknown or cannot be captured, it has no attention, or an argument has no meaning.
    """
    import torch

    from dqar_fx.balance_explanation import explain_balance, require_weights
    from dqar_fx.cli.models import CommandError, parse_schedule
    from dqar_fx.config import CacheConfig
    from dqar_fx.explanation import explain, read_config

    if args.save_balance and not args.calibrate:
        raise CommandError("--save-balance is what --calibrate finds: give both.")
    if args.calibrate and args.config:
        raise CommandError("--calibrate runs the model's own weights, which --config would no longer fit: give one.")
    if args.calibrate:
        require_weights(args.model)
    cache, dtype = CacheConfig.parse(args.cache), getattr(torch, args.dtype)
    sizes = sizes_of(args)
    found = explain(
        args.model,
        parse_schedule(args.schedule, args.steps),
        cache,
        config=read_config(args.config) if args.config else None,
        patterns=args.sites,
        dtype=dtype,
        sizes=sizes,
    )
    if args.calibrate:
        found["balance"], balance = explain_balance(args.model, cache, dtype=dtype, sizes=sizes)
        if args.save_balance:
            balance.save(args.save_balance)
    sys.stdout.write(render(found) + "\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if found["sites"] else 1


def render(found: Mapping[str, Any]) -> str:
    """The tables, from what ``explain`` found."""
    from tabulate import tabulate

    head = [
        ["model", f"{found['model']}, {found['parameters'] / 1e6:.1f} M parameters, {found['dtype']}"],
        ["called with", found["inputs"]],
        ["work", f"{found['gflop_per_call']:.2f} GFLOP per call"],
        ["captured", f"{found['captures']} graph(s), {len(found['graph_breaks'])} break(s)"],
        ["schedule", found["schedule"]],
        ["cache", f"{found['cache']}, of {found['stored']}"],
    ]
    lines = [tabulate(head, tablefmt="plain", disable_numparse=True), ""]
    if found["sites"]:
        rows = [
            [
                site["index"],
                site["path"],
                site["kind"],
                site["exits"],
                " ".join("x".join(shape) for shape in site["shapes"]),
                f"{site['flop_share']:.2%}",
                f"{site['planned_reuse']:.0%}{' (exact)' if site['lossless'] and site['planned_reuse'] else ''}",
                f"{site['cache_bytes'] / 1024:.1f}",
            ]
            for site in found["sites"]
        ]
        headers = ["site", "path", "kind", "exits", "shape", "share of FLOP", "planned reuse", "cache KiB"]
        right = ("right", "left", "left", "right", "left", "right", "right", "right")
        lines += [tabulate(rows, headers=headers, colalign=right, disable_numparse=True), ""]
        native = found["native_bytes"] / MIB
        totals = [
            [f"share of FLOP, {found['stored']} of all sites", f"{found['flop_share']:.2%}"],
            ["planned reuse", f"{found['planned_reuse_ratio']:.1%} over {found['num_steps']} steps"],
            ["cache", f"{found['cache_bytes'] / MIB:.2f} MiB per branch, {native:.2f} MiB in {found['dtype']}"],
            *_hoisted_row(found["hoisted"]),
            *_timestep_row(found["timestep_values"]),
            ["speed-up, this schedule", f"at most {found['bound']:.3f}x"],
            ["speed-up, 100 % reuse", f"at most {found['limit']:.3f}x"],
        ]
        lines += [tabulate(totals, tablefmt="plain", disable_numparse=True)]
    lines += [f"left computing: {s['path'] or '?'} ({s['kind']}): {s['reason']}" for s in found["left_computing"]]
    lines += [f"graph break: {b['reason']} at {b['where']}" for b in found["graph_breaks"]]
    if found["uncounted"]:
        lines.append(f"not in the count of FLOP: {'; '.join(found['uncounted'])}")
    lines += [f"note: {text}" for text in found["advice"]]
    if "balance" in found:
        lines += ["", *_render_balance(found["balance"])]
    return "\n".join(lines)


def _hoisted_row(hoisted: Mapping[str, Any]) -> list[list[str]]:
    if not hoisted["values"]:
        return []
    saved = f"{hoisted['flop_share']:.2%} of FLOP and {hoisted['weight_share']:.1%} of the weights at each later step"
    return [["computed once", f"{hoisted['values']} values, {hoisted['bytes'] / MIB:.2f} MiB per branch: {saved}"]]


def _timestep_row(timed: Mapping[str, Any]) -> list[list[str]]:
    if not timed["values"]:
        return []
    saved = f"{timed['weight_share']:.1%} of the weights need not be read at each later step"
    return [["for all steps at once", f"{timed['values']} values, {timed['bytes'] / MIB:.2f} MiB per branch: {saved}"]]


def _render_balance(found: Mapping[str, Any]) -> list[str]:
    """Two tables: each site as the cache is configured, and all sites for every layout."""
    from tabulate import tabulate

    keys = found["of"] == "keys"
    modes, shown = found["modes"], ("value", "attention") if keys else ("value",)
    headers = [f"{mode}{': attention' if what == 'attention' else ''}" for what in shown for mode in modes]

    def row(entries: Sequence[Mapping[str, Any]]) -> list[str]:
        by = {(entry["of"], entry["mode"]): entry for entry in entries}
        return [_error(by.get((what, mode))) for what in shown for mode in modes]

    lines = [
        f"balancing the channels of {found['of']}: relative error of what is read back (signal to noise in dB)",
        f"{found['calls']} calls to calibrate, and as many with other noise to measure",
        f"run with {found['inputs']}",
    ]
    own = [entry for entry in found["sites"] if entry["cache"] == found["cache"]]
    if own:
        sites = list(dict.fromkeys(entry["site"] for entry in own))
        rows = [[site or "?", *row([e for e in own if e["site"] == site])] for site in sites]
        lines += ["", tabulate(rows, headers=[found["cache"], *headers], disable_numparse=True)]
    rows = [[text, *row([e for e in found["total"] if e["cache"] == text])] for text in found["compared"]]
    lines += ["", tabulate(rows, headers=["all sites", *headers], disable_numparse=True)]
    if keys:
        lines.append("attention: what the attention gives for its own queries and exact values.")
    lines += [f"not balanced: {site or '?'}" for site in found["unbalanced"]]
    return lines


def _error(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    decibels = "" if entry["sqnr_db"] is None else f" ({entry['sqnr_db']:.1f})"
    return f"{entry['relative_error']:.3%}{decibels}"
