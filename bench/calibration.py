"""What calibration finds on the shipped digits model, against the rules at the same reuse, on seeds it has not seen.

For each rule, the plan that calibration finds at the rule's share of reuse; for each budget, the plan within it. Also
how well the coefficients order plans (rank correlation of predicted with real error, over random plans), what INT8
adds, and what it all took, in generations.

    python bench/calibration.py                    # a quarter of an hour on two cores
    python bench/calibration.py --guidance 1 --output runs/guidance1/calibration.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from tabulate import tabulate

from dqar_fx import CacheConfig, Plan, Schedule, digits
from dqar_fx.calibration.calibrate import Calibration
from dqar_fx.calibration.runs import Runs
from dqar_fx.calibration.solve import predict

RULES = ("linear:warmup=0.2,fraction=1.0", "interval:every=2,warmup=0.2", "interval:every=3,warmup=0.1", "taper")
BUDGETS = ("psnr=30", "psnr=40", "rel_error=0.01")


def main(argv: list[str] | None = None) -> None:
    """Calibrate, compare, write one JSON document, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=digits.GUIDANCE)
    parser.add_argument("--seeds", type=int, default=8, help="to learn from")
    parser.add_argument("--unseen", type=int, nargs="+", default=[101, 102, 103, 104, 105, 106])
    parser.add_argument("--images", type=int, default=10, help="of each seed")
    parser.add_argument("--random", type=int, default=24, help="random plans, for the rank correlation")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "calibration" / "calibration.json")
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    model, scheduler = digits.load(), digits.make_scheduler()
    classes = [i % 10 for i in range(args.images)]

    def sample(module: torch.nn.Module, seed: int) -> torch.Tensor:
        return digits.sample(
            module, classes=classes, seed=seed, num_steps=args.steps, guidance=args.guidance, scheduler=scheduler
        )

    sample(model, 0)
    started = time.perf_counter()
    sample(model, 0)
    one = time.perf_counter() - started
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with Calibration(
        model, sample, num_steps=args.steps, seeds=range(args.seeds), scheduler=scheduler, backend=args.backend
    ) as calibration:
        sweep = time.perf_counter() - started
        sites = len(calibration.sites)
        cases = [(rule, Schedule.parse(rule).with_steps(args.steps).plan(sites)) for rule in RULES]
        for rule, plan in cases:
            started, before = time.perf_counter(), calibration.generations
            found = calibration.choose(f"reuse={plan.reuse_ratio}")
            found.save(args.output.with_name(f"plan-reuse-{100 * plan.reuse_ratio:.0f}.json"))
            rows.append(
                {
                    "against": rule,
                    "rule_reuse": plan.reuse_ratio,
                    "rule": calibration.measure_plan(Plan(plan.reuse), args.unseen).to_dict(),
                    **_of(calibration, found, args.unseen),
                    "generations": calibration.generations - before,
                    "seconds": time.perf_counter() - started,
                }
            )
            print(rows[-1], flush=True)
        budgets = []
        for budget in BUDGETS:
            started, before = time.perf_counter(), calibration.generations
            found = calibration.choose(budget)
            budgets.append(
                {
                    "budget": budget,
                    **_of(calibration, found, args.unseen),
                    "generations": calibration.generations - before,
                    "seconds": time.perf_counter() - started,
                }
            )
            print(budgets[-1], flush=True)
        rng = np.random.default_rng(0)
        pairs = []
        for _ in range(args.random):
            every, start, length = rng.integers(2, 6), rng.integers(0, args.steps - 12), rng.integers(2, 12)
            reuse = np.zeros((args.steps, sites), bool)
            steps = np.arange(start, start + length)
            reuse[steps[(steps - start) % every > 0]] = True
            reuse[:, rng.random(sites) < 0.3] = False
            if reuse.any():
                real = calibration.measure_plan(Plan(reuse), calibration.seeds[:2])
                pairs.append((predict(calibration.coefficients, reuse), real.rel_error))
        table = np.array(pairs)
        ranks = table.argsort(0).argsort(0)
        correlation = float(np.corrcoef(ranks.T)[0, 1])
        best = calibration.choose("reuse=0.6")
        inexact = calibration.measure_plan(Plan(best.reuse), args.unseen).to_dict()
    settings = {"cache": CacheConfig(dtype="native"), "scheduler": scheduler, "backend": args.backend}
    native = Runs(model, sample, args.steps, settings, lambda: None)
    native.data_range = best.calibration["data_range"] if best.calibration else 2.0
    exact = native.loss(Plan(best.reuse), args.unseen).to_dict()
    native.close()
    document = {
        **common.where(torch.device("cpu")),
        "benchmark": "calibration of the digits model",
        "steps": args.steps, "guidance": args.guidance, "images": args.images,
        "seeds": args.seeds, "unseen": args.unseen,
        "seconds_of_a_generation": one, "seconds_of_the_sweep": sweep,
        "same_reuse": rows, "budgets": budgets,
        "rank_correlation": correlation, "random_plans": len(pairs),
        "reuse=0.6, int8 cache": inexact, "reuse=0.6, native cache": exact,
    }  # fmt: skip
    args.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(
        tabulate(
            [
                [
                    r["against"],
                    f"{r['rule_reuse']:.2f}",
                    f"{r['rule']['psnr']:.1f}",
                    f"{r['reuse']:.2f}",
                    f"{r['unseen']['psnr']:.1f}",
                    f"{r['predicted']['rel_error'] / r['unseen']['rel_error']:.2f}",
                ]
                for r in rows
            ],
            headers=["rule", "reused", "PSNR dB", "calibrated", "PSNR dB", "predicted / measured error"],
        )
    )
    print(
        tabulate(
            [[b["budget"], f"{b['reuse']:.3f}", f"{b['unseen']['psnr']:.1f}", b["generations"]] for b in budgets],
            headers=["budget", "reused", "PSNR dB, unseen", "generations"],
        )
    )
    print(f"rank correlation of predicted with real error, {len(pairs)} random plans: {correlation:.3f}")
    print(
        f"sweep: {sweep:.0f} s, {sweep / one:.0f} generations; INT8 {inexact['psnr']:.2f} dB, "
        f"native {exact['psnr']:.2f} dB"
    )


def _of(calibration: Calibration, plan: Plan, unseen: list[int]) -> dict[str, Any]:
    record = plan.calibration or {}
    return {
        "reuse": plan.reuse_ratio,
        "groups": plan.schedule,
        "speedup_in_flop": record["speedup_in_flop"],
        "first_order_psnr": record["first_order_psnr"],
        "predicted": record["predicted"],
        "verified": record["verified"],
        "unseen": calibration.measure_plan(Plan(plan.reuse), unseen).to_dict(),
        "plan": ["".join("#" if r else "." for r in row) for row in plan.reuse.T],
    }


if __name__ == "__main__":
    main()
