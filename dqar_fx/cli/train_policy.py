"""``dqar-fx train-policy``: learn from traces which reuses are harmless."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "train a policy on what dqar-fx trace has measured, and show how well its probabilities hold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to learn from and how; where to write."""
    parser.add_argument("traces", nargs="+", type=Path, metavar="FILE", help="written by dqar-fx trace")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("policy.safetensors"),
        metavar="FILE",
        help="the policy; its numbers go to the .json and the calibration to the .png beside it (default: "
        "policy.safetensors)",
    )
    parser.add_argument(
        "--features",
        metavar="NAME,...",
        help="what the policy is told: entropy,log_snr,log_norm,progress,prompt (the default), also age, reuses, "
        "depth, change, step, site",
    )
    parser.add_argument("--hidden", default="32,32", metavar="N,...", help="sizes of the layers (default: 32,32)")
    parser.add_argument(
        "--harm",
        choices=("final", "site"),
        default="final",
        help="what counts: the error of the final sample, or that of the value that is read (default: final)",
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--harmless", type=float, default=0.5, metavar="Q", help="share of candidates that is harmless (default: 0.5)"
    )
    limit.add_argument("--threshold", type=float, metavar="E", help="relative error up to which one is harmless")
    parser.add_argument("--held-out", type=float, default=0.25, metavar="Q", help="share of seeds (default: 0.25)")
    parser.add_argument("--epochs", type=int, default=2000, metavar="N", help="at most (default: 2000)")
    parser.add_argument(
        "--patience", type=int, default=200, metavar="N", help="epochs without progress to stop after (default: 200)"
    )
    parser.add_argument("--learning-rate", type=float, default=0.01, metavar="R", help="of Adam (default: 0.01)")
    parser.add_argument(
        "--min-probability", type=float, default=0.5, metavar="P", help="from which on values are read (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the training (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Train, save, draw, and print the table."""
    from dqar_fx.cli import models, terminal
    from dqar_fx.policy import FEATURES, Policy
    from dqar_fx.policy_training import plot_calibration

    try:
        hidden = tuple(int(part) for part in args.hidden.split(",") if part)
    except ValueError as error:
        raise models.CommandError(f"--hidden {args.hidden}: give sizes, separated by commas, as in 32,32.") from error
    if args.output.suffix != ".safetensors":
        raise models.CommandError(f"--output {args.output}: give a name that ends in .safetensors.")
    policy = Policy.train(
        args.traces, features=args.features.split(",") if args.features else FEATURES, hidden=hidden, harm=args.harm,
        harmless=args.harmless, threshold=args.threshold, held_out=args.held_out, epochs=args.epochs,
        patience=args.patience, learning_rate=args.learning_rate, min_probability=args.min_probability, seed=args.seed,
    )  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    policy.save(args.output)
    picture = plot_calibration(policy, args.output.with_suffix(".png"))
    terminal.say(_table(policy))
    terminal.say(f"{args.output}, {args.output.with_suffix('.json').name}, {picture.name}")
    return 0


def _table(policy: Any) -> str:
    from tabulate import tabulate

    known = policy.training
    rows = [
        ["policy", f"{policy}, {policy.num_parameters} parameters"],
        ["harmless", f"{known['harm']} error up to {known['tau']:.3g}"],
        [
            "learned from",
            f"{known['candidates']['learned']} candidates of {len(known['generations']['learned'])} generations",
        ],
        ["held out", f"{known['candidates']['held_out']} of {len(known['generations']['held_out'])}"],
        ["epochs", f"{known['best_epoch']} (stopped at {known['epochs']})"],
        ["loss, held out", f"{known['held_out_loss']:.3f} (constant prediction: {known['constant_loss']:.3f})"],
        ["harmless reads allowed", f"{known['harmless_allowed']:.1%}"],
        ["harmful reads allowed", f"{known['harmful_allowed']:.1%}"],
        ["rank correlation with harm", f"{known['rank_correlation']:.2f}"],
        ["calibration error", f"{known['calibration_error']:.3f}"],
    ]
    bins = [[b["probability"], b["weighted"], b["harmless"], b["count"]] for b in known["calibration"]]
    headers = ["predicted", "harmless by weight", "by number", "reads"]
    return f"{tabulate(rows, tablefmt='plain')}\n\n{tabulate(bins, headers=headers, floatfmt='.2f')}\n"
