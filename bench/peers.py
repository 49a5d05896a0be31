"""What other caches for diffusion transformers gain and cost beside dqar_fx: one command, one process each.

Same weights, inputs, seeds and steps for all. Contenders: the model eager, compiled, with its repeated blocks compiled;
dqar_fx (nothing reused, native, INT8, INT4, keys and values); diffusers' PyramidAttentionBroadcast, FasterCache,
FirstBlockCache, TaylorSeer and MagCache; cache-dit's DBCache alone and with TaylorSeer (``pip install
'dqar-fx[bench]'``). Each is run eagerly (``pab``) and compiled in the best way that it allows (``pab@whole``;
``contest/contenders.py`` says which ways there are). PAB and dqar_fx follow one plan, and ``to_pab`` is the relative
difference of their samples: with a native cache they must agree.

    python bench/peers.py --models dit-256                         # all contenders, on the CPU
    python bench/peers.py --models dit-256 flux --steps 10 --small # seconds each, for trying it out
    python bench/peers.py --models flux-1024 --device cuda --dtype bfloat16 --contenders none dqar-int8@own pab@under

Columns: ``cold_s``: the first generation of a fresh process less a warm one; ``second_s``: the same in a second process
that finds what the first one compiled. ``compute_ms``, ``reuse_ms``: a step that computes everything, and one that
reuses. ``speedup``: over ``none@whole`` (the compiled model without a cache; ``--baseline`` names another), whose
generations alternate with everybody's. ``bound``: what the speed-up could be if only FLOP counted, from those of a
generation as it ran; ``of_bound``: their quotient. ``host_ms``: time until a call of the model returns on an idle GPU,
waiting for reads of the device included; on a CPU only of the model ``host``, whose kernels take next to no time: its
step. ``captures``, ``breaks``, ``recompiles``: Dynamo's, of the whole process. ``cache_mib``: held at most;
``peak_mib``: allocated at most in a generation, above what was before. ``rel_error`` and ``psnr_db`` (whose peak is the
reference's range): against ``reference``, the same without the cache, compiled alike if that takes part; ``psnr_db`` is
empty where both are equal. Weights are random: ``contest/models.py`` says what that means.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

from contest import contenders, models, picture, race

#: The table is cut in two, or it would be wider than a screen.
SPEED = (
    "case", "generation_s", "speedup", "bound", "of_bound", "compute_ms", "reuse_ms", "host_ms", "cold_s", "second_s",
    "captures", "breaks", "recompiles",
)  # fmt: skip
COST = ("case", "reuse_%", "cache_mib", "peak_mib", "rel_error", "psnr_db", "to_pab", "note")


def cell(row: dict[str, Any], column: str) -> Any:
    """What the table shows."""
    if column == "reuse_%":
        return 100 * row["reuse"] if row.get("reuse") is not None else None
    if column == "to_pab" and row.get("bitwise_pab"):
        return "equal, bit for bit"
    if column in ("rel_error", "to_pab") and row.get(column) is not None:
        return f"{row[column]:.1e}" if row[column] else "0"
    return row.get(column)


def table(rows: list[dict[str, Any]]) -> str:
    """All that was measured on one model, for people."""
    measured = [row for row in rows if "speedup" in row]
    parts = [
        tabulate([[cell(row, c) for c in columns] for row in measured], headers=columns, floatfmt=".4g")
        for columns in (SPEED, COST)
    ]
    parts += [f"{row['case']}: {row['note']}" for row in rows if "speedup" not in row]
    return "\n\n".join(parts)


def agreement(rows: list[dict[str, Any]]) -> str:
    """Whether the caches that follow the plan agree with PAB, in one sentence for each."""
    said = []
    for row in rows:
        if row.get("to_pab") is None or row["case"] == "pab" or row["cache"] not in ("pab", "dqar-native"):
            continue
        how = "bit for bit" if row["bitwise_pab"] else f"to {row['to_pab']:.1e}"
        said.append(f"{row['case']} agrees with pab {how}")
    return "Equal plans: " + ("; ".join(said) + "." if said else "not compared, which takes pab and dqar-native.")


def starts(rows: list[dict[str, Any]]) -> str:
    """Cold starts beside that of regional compilation, in one sentence for each of ours."""
    regional = next((row.get("cold_s") for row in rows if row["case"] == contenders.REGIONAL), None)
    if not regional:
        return f"Cold starts: not compared, which takes {contenders.REGIONAL}."
    said = []
    for row in rows:
        if row["cache"].startswith("dqar") and row.get("cold_s") is not None:
            again = f", {row['second_s'] / regional:.2f} in a second process" if row["second_s"] is not None else ""
            said.append(f"{row['case']} {row['cold_s'] / regional:.2f}{again}")
    return f"Cold starts as shares of {contenders.REGIONAL}'s: " + ("; ".join(said) or "none of dqar_fx's") + "."


def main(argv: list[str] | None = None) -> None:
    """Measure, write the records, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(models.CASES), default=["dit-256"], metavar="MODEL",
                        help=", ".join(models.CASES))  # fmt: skip
    parser.add_argument("--contenders", nargs="+", default=list(contenders.DEFAULT), metavar="NAME",
                        help=f"of {', '.join(contenders.CONTENDERS)}, with @WAY where compiled")  # fmt: skip
    parser.add_argument("--baseline", default=contenders.BASELINE, help="what speeds are ratios to")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=3, help="compute at every so many steps ...")
    parser.add_argument("--warmup", type=float, default=0.1, help="... behind this share of them")
    parser.add_argument("--rounds", type=int, default=5, help="timed generations of each")
    parser.add_argument("--small", action="store_true", help="tiny models: to see it work")
    parser.add_argument("--blocks", type=int, help="blocks of the models, instead of their own number")
    parser.add_argument("--group", type=int, default=4, help="processes alive at a time, beside the baseline's")
    parser.add_argument("--jobs", type=int, default=1, help="how many compile at a time; cold_s is exact with 1")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    parser.add_argument("--no-second", action="store_true", help="without second processes")
    parser.add_argument("--patience", type=float, default=1800, help="seconds until a process is given up")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, default=common.RESULTS / "peers.jsonl")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        from contest import child

        child.main(json.loads(args.child))
        return
    try:
        for name in (args.baseline, *args.contenders):
            contenders.split(name)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)  # for the records
    deadline = time.monotonic() + args.budget
    schedule = f"interval:steps={args.steps},every={args.every},warmup={args.warmup}"
    origin = common.where(device)
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        settings = {
            "model": model, "steps": args.steps, "schedule": schedule, "device": args.device, "dtype": args.dtype,
            "small": args.small, "blocks": args.blocks, "threads": args.threads,
        }  # fmt: skip
        print(f"{model}:", flush=True)
        contest = race.Race(
            settings, baseline=args.baseline, rounds=args.rounds, group=args.group, jobs=args.jobs,
            second=not args.no_second, patience=args.patience, deadline=deadline,
        )  # fmt: skip
        mine = list(race.rows(contest.run(args.contenders, lambda line: print(line, flush=True)), settings))
        rows += mine
        title = next((row["title"] for row in mine if row.get("title")), "")
        text = f"{model}: {title}, {args.dtype}, {schedule}\n\n{table(mine)}\n\n{agreement(mine)}\n{starts(mine)}"
        print(f"\n{text}\n", flush=True)
        texts.append(text)
        # After every model: whoever runs out of time keeps what there is.
        args.output.write_text("".join(json.dumps({**row, **origin}) + "\n" for row in rows))
        args.output.with_suffix(".txt").write_text("\n\n\n".join(texts) + "\n")
        picture.draw(rows, args.output.with_suffix(".png"))
    print(f"{origin['machine']}, torch {origin['torch']}, {origin['date']}, commit {origin['commit']} -> {args.output}")


if __name__ == "__main__":
    main()
