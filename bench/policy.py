"""The learned policy against a random gate, the gate on entropy and that on change, at the same share of reuse.

All of them stand behind one schedule, which would reuse wherever it can, and read a stored value at most once. The
limit of each is searched for until it reuses the same share; then the images are compared with those that the same
model draws without reuse, from the same noise. The policy has never seen these seeds. Errors only: nothing is compiled.
``early`` and ``late`` are fixed schedules for comparison: every second step, from step 3 on or up to the last.

    dqar-fx trace --seeds 0,1,2,3 --runs 150 --output traces.jsonl
    dqar-fx train-policy traces.jsonl --output policy.safetensors
    python bench/policy.py --policy policy.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import dqar_fx
from dqar_fx import ChangeGate, EntropyGate, Gates, Policy, Schedule, digits

COLUMNS = ("case", "gate", "reuse_ratio", "psnr_db", "mean_psnr_db", "rel_l2_error")
RESULTS = common.RESULTS / "policy"
#: Images go from -1 to 1.
RANGE = 2.0
#: Most steps of the search for a limit.
SEARCH = 12
#: Log-odds between which the limit of a policy is searched for: probabilities are crowded at 0 and 1.
ODDS = 12.0


@dataclasses.dataclass(eq=False)
class Random:
    """Allows a share of all reads, each by a number drawn for its step and site and for the seed of the images.

    Args:
        min_probability: what a number from 0 to 1 must reach.
        seed: of the numbers.
    """

    min_probability: float
    seed: int = 0
    features: tuple[str, ...] = ("step", "site")

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """One number for each read."""
        return np.array([np.random.default_rng([self.seed, int(t), int(s)]).random() for t, s in rows])

    def __str__(self) -> str:
        return f"random, {1 - self.min_probability:.3f} of the reads"


class Bench:
    """Draws the same images under any gates.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.scheduler = digits.load(args.device), digits.make_scheduler()
        self.classes = [i % 10 for i in range(args.images)]
        self.reference = {seed: self.draw(seed) for seed in args.seeds}

    def draw(self, seed: int) -> torch.Tensor:
        """One batch of images, on the CPU."""
        return digits.sample(
            self.model, classes=self.classes, seed=seed, num_steps=self.args.steps, scheduler=self.scheduler
        ).cpu()

    def run(self, gates: Gates | None, schedule: Schedule | None = None) -> dict[str, Any]:
        """Share of reuse, and errors, over the images of all seeds."""
        seeds = self.args.seeds
        schedule = schedule or Schedule.always(self.args.steps, warmup=2)
        dqar_fx.optimize(self.model, schedule, gates=gates, scheduler=self.scheduler, backend=self.args.backend)
        images, ratios = [], []
        for seed in seeds:
            if gates is not None and isinstance(gates.policy, Random):
                gates.policy.seed = seed
            images.append(self.draw(seed))
            ratios.append(dqar_fx.runtime(self.model).stats.reuse_ratio)
        dqar_fx.restore(self.model)
        found, reference = torch.cat(images), torch.cat([self.reference[seed] for seed in seeds])
        errors = (found.double() - reference.double()).square().mean((1, 2, 3))
        return {
            "reuse_ratio": sum(ratios) / len(ratios),
            "psnr_db": float(10 * torch.log10(RANGE**2 / errors.mean())),  # infinite where nothing was reused
            "mean_psnr_db": float((10 * torch.log10(RANGE**2 / errors)).mean()),
            "rel_l2_error": common.relative_error(found, reference),
        }

    def at(self, ratio: float, gates_of: Callable[[float], Gates], low: float, high: float) -> dict[str, Any]:
        """What the gate does at the limit between ``low`` (reuses least) and ``high`` at which it reuses ``ratio``."""
        below, above = 0.0, 0.5  # what is reused at most: every other step
        for number in range(SEARCH):
            # In turn, where a straight line says, and half-way.
            share = (ratio - below) / (above - below) if number % 2 == 0 else 0.5
            middle = low + min(max(share, 0.05), 0.95) * (high - low)
            found = self.run(gates_of(middle))
            reused = found["reuse_ratio"]
            if abs(reused - ratio) <= self.args.tolerance:
                break
            low, below, high, above = (middle, reused, high, above) if reused < ratio else (low, below, middle, reused)
        gates = gates_of(middle)
        gate = next(str(gate) for gate in reversed(gates.cascade()))
        return {**found, "limit": middle, "gate": gate}


def main(argv: list[str] | None = None) -> None:
    """Search, draw, write the records, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, nargs="+", default=[RESULTS / "policy.safetensors"])
    parser.add_argument("--gates", nargs="*", default=["random", "entropy", "change"], help="to compare with")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--tolerance", type=float, default=0.005, help="of the share of reuse, absolute")
    parser.add_argument("--max-reuse", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=10, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "policy.jsonl")
    args = parser.parse_args(argv)
    bench = Bench(args)

    def gates(**settings: Any) -> Gates:
        return Gates(**{"entropy": None, "snr": None, "max_reuse": args.max_reuse, **settings})

    cases: dict[str, tuple[Callable[[float], Gates], float, float]] = {
        "random": (lambda limit: gates(policy=Random(1 - limit)), 0.0, 1.0),
        "entropy": (lambda limit: gates(entropy=EntropyGate(limit, normalize="keys")), 0.0, 1.0),
        "change": (lambda limit: gates(change=ChangeGate(limit)), 0.0, 2.0),
    }
    cases = {name: cases[name] for name in args.gates}
    for path in args.policy:
        policy = Policy.load(path)
        known = policy.training["generations"]
        if seen := set(args.seeds) & {*known["learned"], *known["held_out"]}:
            raise SystemExit(f"{path} was trained on the seeds {sorted(seen)}. Give others.")

        def with_policy(limit: float, policy: Policy = policy) -> Gates:
            return gates(policy=dataclasses.replace(policy, min_probability=1 / (1 + math.exp(limit))))

        cases[path.stem] = with_policy, -ODDS, ODDS
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(
            {
                **row, "model": "digits", "steps": args.steps, "max_reuse": args.max_reuse,
                "images": args.images * len(args.seeds), "seeds": args.seeds,
            }
        )  # fmt: skip
        print({key: row.get(key) for key in COLUMNS}, flush=True)

    for ratio in args.ratios:
        reused = round(ratio * args.steps)
        for name, first in (("early", 3), ("late", args.steps + 1 - 2 * reused)):
            chosen = frozenset(range(first, args.steps, 2)[:reused])
            fixed = Schedule.custom(args.steps, lambda t, *_, chosen=chosen: t in chosen)
            gate = f"steps {min(chosen)}, {min(chosen) + 2}, ... {max(chosen)}"
            add({"case": f"{ratio:.0%} {name}", **bench.run(None, fixed), "gate": gate, "asked_ratio": ratio})
        for name, (gates_of, low, high) in cases.items():
            add({"case": f"{ratio:.0%} {name}", **bench.at(ratio, gates_of, low, high), "asked_ratio": ratio})
    common.finish(rows, COLUMNS, torch.device(args.device), args.output)


if __name__ == "__main__":
    main()
