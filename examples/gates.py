"""Gates on the model that ships: sample, look at what was measured, choose a limit from it, and see what it does.

    python examples/gates.py

A fixed schedule reuses at the same steps whatever is drawn. ``ChangeGate`` blocks a reuse where a site's result, when
it was last computed, was further than the limit from the one stored before it. A good limit is one that some changes
exceed and others do not, so measure first: with a limit of 0 nothing is reused and everything is measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

import dqar_fx
from dqar_fx import CacheConfig, ChangeGate, Gates, Schedule, digits

CLASSES = range(10)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what the gated and the ungated runs reuse, and how far their images are from those without reuse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", help='"eager" needs no compiler')
    parser.add_argument("--output", type=Path, help="a folder for a picture of the decisions")
    args = parser.parse_args(argv)
    model, scheduler = digits.load(), digits.make_scheduler()
    every_other = Schedule.interval(args.steps, every=2, warmup=2)

    def draw() -> Tensor:
        return digits.sample(model, classes=list(CLASSES), seed=args.seed, num_steps=args.steps, scheduler=scheduler)

    def draw_with(**settings: Any) -> tuple[Tensor, Any]:
        dqar_fx.optimize(model, every_other, scheduler=scheduler, backend=args.backend, **settings)
        images, stats = draw(), dqar_fx.runtime(model).stats
        dqar_fx.restore(model)
        return images, stats

    reference = draw()
    _, measuring = draw_with(gates=Gates(entropy=None, snr=None, change=ChangeGate(0)))
    changes = [m.change for m in measuring.measurements if not math.isnan(m.change)]
    limit = statistics.median(changes)
    print(f"changes from {min(changes):.3f} to {max(changes):.3f}, half of them below {limit:.3f}")

    rows = []
    for name, settings in {
        "schedule alone": {},
        f"ChangeGate({limit:.3f})": {"gates": Gates(entropy=None, snr=None, change=ChangeGate(limit))},
        "schedule alone, keys and values": {"cache": CacheConfig(target="kv")},
    }.items():
        images, stats = draw_with(**settings)
        error = float((images - reference).square().mean())
        rows.append([name, f"{stats.reuse_ratio:.0%}", 10 * math.log10(4 / error)])
        if args.output is not None and "gates" in settings:
            print(stats.plot(args.output / "decisions.png", title=name))
    print(tabulate(rows, headers=["", "reused", "PSNR dB"], floatfmt=".1f"))


if __name__ == "__main__":
    main()
