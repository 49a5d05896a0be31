"""The pass as a backend of ``torch.compile``, found by its name: for code that compiles its model already.

    python examples/compile_backend.py

The model is the one that ships with the package; it draws one digit of each class.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import dqar_fx
from dqar_fx import digits


def main(argv: Sequence[str] | None = None) -> None:
    """Draw ten digits, and print what was reused and how many came out as asked."""
    parser = argparse.ArgumentParser(description="Attention reuse by torch.compile(model, backend='dqar_fx').")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="what the rewritten pieces are compiled with")
    args = parser.parse_args(argv)

    schedule = dqar_fx.Schedule.taper(args.steps)
    options = {"schedule": schedule, "backend": args.backend}
    compiled = torch.compile(digits.load(), backend="dqar_fx", options=options)

    images = digits.sample(compiled, classes=range(10), seed=0, num_steps=args.steps)

    stats = dqar_fx.runtime(compiled).stats
    print(f"{stats.steps} steps: computed {stats.computed} attentions, reused {stats.reused} ({stats.reuse_ratio:.1%})")
    print(f"{stats.captures} graphs, {stats.graph_breaks} graph breaks, {stats.variants} compiled pieces")
    print(f"cache {stats.cache_bytes / 1024:.0f} KiB, compiled in {stats.compile_seconds:.1f} s")
    print(f"{digits.agreement(images, range(10)):.0%} of the digits are read as what they should be")


if __name__ == "__main__":
    main()
