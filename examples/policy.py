"""A learned policy on the model that ships: measure what single reads do, learn from it, and let it decide.

    python examples/policy.py                # two minutes on two cores: a small trace
    dqar-fx trace ... ; dqar-fx train-policy # the same, for more of it, and resumable

What a policy learns from has to be measured: each candidate is one generation in which one site reads at one step.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

import dqar_fx
from dqar_fx import Gates, Policy, Schedule, digits
from dqar_fx.traces import Tracer, Traces


def main(argv: Sequence[str] | None = None) -> None:
    """Print how the policy was trained, and what it lets pass on a seed that it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--runs", type=int, default=40, help="candidates to measure of each seed")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--backend", default="inductor", help='"eager" needs no compiler')
    args = parser.parse_args(argv)
    model, scheduler = digits.load(), digits.make_scheduler()
    schedule = Schedule.always(args.steps, warmup=2)  # every read is a candidate

    def draw(seed: int) -> Tensor:
        return digits.sample(model, classes=range(args.images), seed=seed, num_steps=args.steps, scheduler=scheduler)

    measured = []
    with Tracer(model, draw, schedule, scheduler=scheduler, backend=args.backend) as tracer:
        for seed in range(args.seeds):
            candidates, reference = tracer.candidates(seed)
            for index in np.random.default_rng(seed).permutation(len(candidates))[: args.runs]:
                measured += tracer.measure(candidates[index], reference)
    policy = Policy.train(Traces.of(measured), harmless=0.4)
    print(policy)

    seed = args.seeds  # unseen
    reference = draw(seed)
    gates = Gates(entropy=None, snr=None, max_reuse=1, policy=policy)
    dqar_fx.optimize(model, schedule, gates=gates, scheduler=scheduler, backend=args.backend)
    images, stats = draw(seed), dqar_fx.runtime(model).stats
    dqar_fx.restore(model)
    blocked = sum(decision.reason == "policy" for decision in stats.decisions)
    psnr = 10 * math.log10(4 / float((images - reference).square().mean()))
    print(f"{len(measured)} reads measured; reused {stats.reuse_ratio:.0%}, blocked {blocked} reads, {psnr:.1f} dB")


if __name__ == "__main__":
    main()
