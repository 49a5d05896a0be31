"""Train the small classifier whose features the Fréchet distance of digits is taken between.

    python examples/train_digits_classifier.py --out dqar_fx/assets    # the shipped weights: some seconds

Every fifth of scikit-learn's digits is kept out of the training and tells how good the classifier is. Written to
``--out``: the weights in float16 (``digits_classifier.safetensors``) and their making (``digits_classifier.json``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dqar_fx import digits
from dqar_fx.evaluation.digits_classifier import RECORD, WEIGHTS, DigitsClassifier, load

MAX_SHIFT = 1  # pixels: a digit beside its place is the same digit


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """The whole batch moved by up to a pixel each way, background filled in."""
    dy, dx = torch.randint(0, 2 * MAX_SHIFT + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, [MAX_SHIFT] * 4, value=-1.0)
    return padded[..., dy : dy + digits.SIZE, dx : dx + digits.SIZE]


def train(epochs: int, batch: int, peak: float, seed: int) -> tuple[DigitsClassifier, Tensor]:
    """The trained classifier, and the indices of the digits that it has not seen."""
    images, classes = digits.real_digits()
    held_out = torch.arange(len(images)) % 5 == 0
    seen = (~held_out).nonzero().flatten()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for pick in seen[torch.randperm(len(seen), generator=generator)].split(batch):
            loss = F.cross_entropy(model(shift(images[pick], generator)), classes[pick], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
        schedule.step()
    return model.eval(), held_out.nonzero().flatten()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write, and measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_classifier"), help="folder to write to")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model, held_out = train(args.epochs, args.batch, args.lr, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.out / WEIGHTS)
    images, classes = digits.real_digits()
    right = load(args.out)(images).argmax(1) == classes  # as it was written, round-off included
    record = {
        "dataset": "scikit-learn load_digits, 1797 images of 8 x 8; every fifth held out, from the first on",
        "epochs": args.epochs,
        "batch": args.batch,
        "learning_rate": args.lr,
        "seed": args.seed,
        "held_out_images": len(held_out),
        "held_out_accuracy": round(float(right[held_out].float().mean()), 4),
    }
    (args.out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
