"""Training of the learned policy: from traces to a network, with numbers that say how good it is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqar_fx.errors import PolicyError
from dqar_fx.policy import ALL_FEATURES, FEATURES, MAX_PARAMETERS, Array, Policy, check_features
from dqar_fx.traces import Traces

__all__ = ["plot_calibration", "train"]

HARMS = ("final", "site")
#: A single trace may weigh as much as this many harmless ones. Beyond it a few outliers would decide alone.
MAX_WEIGHT = 10.0
#: A feature whose standard deviation is below this share of its size is constant, up to round-off.
_CONSTANT = 1e-9
_BINS = 10
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"  # Okabe and Ito's


def train(
    traces: Traces,
    *,
    features: Sequence[str] = FEATURES,
    hidden: Sequence[int] = (32, 32),
    harm: str = "final",
    harmless: float = 0.5,
    threshold: float | None = None,
    held_out: float = 0.25,
    epochs: int = 2000,
    patience: int = 200,
    learning_rate: float = 0.01,
    min_probability: float = 0.5,
    seed: int = 0,
) -> Policy:
    """Learn which reuses are harmless.

    A candidate with harm ``h`` is harmless, ``y = 1``, where ``h <= tau``. What is minimised is the quality-weighted
    cross-entropy (DQAR, R40) of the predicted probability ``p``, a mean weighted by ``w``::

        L = sum_i w_i * -(y_i ln p_i + (1 - y_i) ln(1 - p_i)) / sum_i w_i
        w_i = 1 where y_i = 1,  min(h_i / tau, 10) where y_i = 0

    so that to let a harmful read pass costs in proportion to the harm that it does, and to refuse a harmless one costs
    what the mildest harmful one does. ``p`` then estimates the share of *weight* that is harmless, below the share of
    reads: it is on the safe side, and ``training["calibration"]`` has both.

    Whole generations are held out, never single rows: rows of one generation are too much alike to test with. Training
    (Adam, all rows at once) ends when their loss has not fallen for ``patience`` epochs, and the best weights are kept.

    Args:
        traces: of one model.
        features: what the policy is told; names of ``ALL_FEATURES``.
        hidden: sizes of the hidden layers.
        harm: ``"final"``: of the final sample. ``"site"``: of the site's own value, which is much cheaper to trace.
        harmless: share of the training candidates that count as harmless: ``tau`` is that quantile of their harm.
        threshold: ``tau`` itself, as a relative error; in place of ``harmless``.
        held_out: share of the generations to hold out; at least one.
        epochs: at most.
        patience: epochs without progress to stop after.
        learning_rate: of Adam.
        min_probability: of the policy.
        seed: of the first weights and of the split. The same traces and seed give the same policy.

    Returns:
        The policy; ``training`` has the settings, ``tau``, losses, what a constant prediction would have lost, how many
        reads of either kind it gets right, rank correlation with the harm, and the calibration on what was held out.

    Raises:
        PolicyError: a setting out of range, fewer than two generations, or candidates that are all of one kind.
    """
    check_features(features)
    hidden = tuple(hidden)
    _check(hidden, len(features), harm, harmless, threshold, held_out, epochs, patience, learning_rate)
    rows = traces.features[:, [ALL_FEATURES.index(name) for name in features]]
    harms = traces.final_error if harm == "final" else traces.site_error
    known = np.isfinite(harms) & np.isfinite(rows).all(1)
    rows, harms, generation = rows[known], harms[known], traces.generation[known]
    if len(np.unique(generation)) < 2:
        raise PolicyError(
            f"{len(np.unique(generation))} generations have measured candidates with all of the features "
            f"{', '.join(features)}. At least two are needed, one of them to hold out: trace more seeds."
        )
    is_held_out = _split(generation, held_out, seed)
    tau = float(np.quantile(harms[~is_held_out], harmless)) if threshold is None else threshold
    labels = harms <= tau
    for name, part in (("to learn from", labels[~is_held_out]), ("held out", labels[is_held_out])):
        if part.all() or not part.any():
            raise PolicyError(
                f"all {len(part)} candidates {name} are {'harmless' if part.all() else 'harmful'} at a limit of "
                f"{tau:.3g}. Set the limit (threshold) or the share of harmless ones (harmless) in between."
            )
    weights = np.where(labels, 1.0, np.minimum(harms / max(tau, 1e-30), MAX_WEIGHT))

    mean, std, low, high = _scale(rows[~is_held_out])
    x = torch.from_numpy((np.clip(rows, low, high) - mean) / std).float()
    y, w = torch.from_numpy(labels).float(), torch.from_numpy(weights).float()
    learn, test = torch.from_numpy(~is_held_out), torch.from_numpy(is_held_out)
    network = _network(len(features), hidden, seed)
    losses = _fit(network, x[learn], y[learn], w[learn], x[test], y[test], w[test], epochs, patience, learning_rate)

    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    policy = Policy(
        weights=tuple(layer.weight.detach().double().numpy() for layer in layers),
        biases=tuple(layer.bias.detach().double().numpy() for layer in layers),
        mean=mean, std=std, low=low, high=high,
        features=tuple(features),
        min_probability=min_probability,
    )  # fmt: skip
    found = policy.probabilities(rows[is_held_out])
    training = {
        "harm": harm,
        "tau": tau,
        "harmless": harmless if threshold is None else None,
        "seed": seed,
        **losses,
        "generations": {"learned": _names(generation, learn), "held_out": _names(generation, test)},
        "candidates": {"learned": int((~is_held_out).sum()), "held_out": int(is_held_out.sum())},
        **_quality(found, labels[is_held_out], weights[is_held_out], harms[is_held_out], min_probability),
        "traces": traces.header,
    }
    object.__setattr__(policy, "training", training)  # it is not out of our hands yet
    return policy


def plot_calibration(policy: Policy, path: str | os.PathLike[str], *, size: tuple[float, float] = (6.0, 5.0)) -> Path:
    """Draw, of what was held out in training, how often a read was harmless against how probable that was said to be.

    Args:
        policy: fresh from ``train``, or loaded with the ``.json`` that it was saved with.
        path: where to save the picture; its ending decides the format.
        size: width and height in inches.

    Raises:
        PolicyError: the policy does not know of its training.
    """
    bins = policy.training.get("calibration")
    if not bins:
        raise PolicyError("this policy does not know of its training, so there is nothing to draw. Train it anew.")
    # Figure, not pyplot: no display, no global state, no figure left open.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    for key, colour, label in (
        ("weighted", BLUE, "by weight (what the loss asks for)"),
        ("harmless", ORANGE, "by number of reads"),
    ):
        axes.plot(
            [b["probability"] for b in bins], [b[key] for b in bins], "o-", color=colour, label=label, markersize=5
        )
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="share that was harmless")
    axes.legend(frameon=False, loc="upper left")
    axes.set_title(f"{policy}: calibration on held-out generations", loc="left", fontsize="medium")
    counts.bar([b["probability"] for b in bins], [b["count"] for b in bins], width=0.04, color=GREY)
    counts.set(xlabel="probability that it is harmless, as predicted", ylabel="reads")
    counts.axvline(policy.min_probability, color="black", linewidth=1)
    for each in (axes, counts):
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _check(
    hidden: tuple[int, ...],
    num_features: int,
    harm: str,
    harmless: float,
    threshold: float | None,
    held_out: float,
    epochs: int,
    patience: int,
    learning_rate: float,
) -> None:
    if min(hidden, default=1) < 1:
        raise PolicyError(f"hidden is {hidden}. Give the sizes of the hidden layers, ints of at least 1.")
    widths = (num_features, *hidden, 1)
    parameters = sum((a + 1) * b for a, b in pairwise(widths))
    if parameters >= MAX_PARAMETERS:
        raise PolicyError(f"hidden={hidden} has {parameters} parameters. Stay below {MAX_PARAMETERS}.")
    if harm not in HARMS:
        raise PolicyError(f"harm is {harm!r}. Use one of {', '.join(HARMS)}.")
    for name, value in (("harmless", harmless), ("held_out", held_out)):
        if not 0 < value < 1:
            raise PolicyError(f"{name} is {value}. Give a share between 0 and 1.")
    if threshold is not None and not 0 < threshold < math.inf:
        raise PolicyError(f"threshold is {threshold}. Give a relative error above 0.")
    if epochs < 1 or patience < 1 or not 0 < learning_rate < math.inf:
        raise PolicyError(f"epochs={epochs}, patience={patience}, learning_rate={learning_rate}: all must be positive.")


def _split(generation: Any, share: float, seed: int) -> Any:
    """Which rows are held out: those of ``share`` of all generations, at least one and not all."""
    names = np.random.default_rng(seed).permutation(np.unique(generation))
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    return np.isin(generation, names[:count])


def _names(generation: Any, chosen: Tensor) -> list[int]:
    return [int(name) for name in np.unique(generation[chosen.numpy()])]


def _scale(rows: Array) -> tuple[Array, Array, Array, Array]:
    """Mean, standard deviation, smallest and largest of each feature; a constant one has a deviation of 1."""
    mean, std = rows.mean(0), rows.std(0)
    low, high = rows.min(0), rows.max(0)
    constant = std <= _CONSTANT * np.maximum(np.abs(mean), 1e-30)
    # As they will be read back: what is saved has float32's precision.
    return tuple(  # type: ignore[return-value]  # four of them
        values.astype(np.float32).astype(np.float64) for values in (mean, np.where(constant, 1.0, std), low, high)
    )


def _network(num_features: int, hidden: tuple[int, ...], seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):  # the caller's seed stays where it is
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise((num_features, *hidden)):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear((num_features, *hidden)[-1], 1))


def _fit(
    network: nn.Sequential,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    w_test: Tensor,
    epochs: int,
    patience: int,
    learning_rate: float,
) -> dict[str, Any]:
    """Train ``network`` in place; epochs and losses. The best weights on the test rows are left in it."""

    def loss_of(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        loss: Tensor = nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], y, weight=w, reduction="sum")
        return loss / w.sum()

    best, best_epoch, kept, learned = math.inf, 0, {}, math.nan
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        for epoch in range(epochs):
            with torch.no_grad():
                held_out = float(loss_of(x_test, y_test, w_test))
            optimizer.zero_grad()
            loss = loss_of(x, y, w)
            if held_out < best:
                best, best_epoch, learned = held_out, epoch, float(loss.detach())
                kept = {name: value.clone() for name, value in network.state_dict().items()}
            if epoch - best_epoch >= patience:
                break
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
    if not kept:
        raise PolicyError("the loss is not a number. Lower the learning rate.")
    network.load_state_dict(kept)
    share = float((w * y).sum() / w.sum())  # what one would predict without looking
    share_test = float((w_test * y_test).sum() / w_test.sum())
    constant = -(share_test * math.log(share) + (1 - share_test) * math.log(1 - share))
    return {
        "epochs": epoch + 1,
        "best_epoch": best_epoch,
        "loss": learned,
        "held_out_loss": best,
        "constant_loss": constant,
    }


def _quality(p: Array, labels: Any, weights: Array, harms: Array, limit: float) -> dict[str, Any]:
    """How well ``p`` tells the reads apart, on rows that it was not trained on."""
    allowed = p >= limit
    bins = []
    places = np.minimum((p * _BINS).astype(int), _BINS - 1)
    for place in np.unique(places):
        inside = places == place
        bins.append(
            {
                "probability": float(np.average(p[inside], weights=weights[inside])),
                "weighted": float(np.average(labels[inside], weights=weights[inside])),
                "harmless": float(labels[inside].mean()),
                "count": int(inside.sum()),
            }
        )
    total = sum(weights[places == place].sum() for place in np.unique(places))
    error = sum(
        weights[places == place].sum() / total * abs(b["weighted"] - b["probability"])
        for place, b in zip(np.unique(places), bins, strict=True)
    )
    return {
        "allowed": float(allowed.mean()),
        "harmless_allowed": float(allowed[labels].mean()),
        "harmful_allowed": float(allowed[~labels].mean()),
        "rank_correlation": _rank_correlation(p, -harms),
        "calibration_error": float(error),
        "calibration": bins,
    }


def _rank_correlation(a: Array, b: Array) -> float:
    """Spearman's, ties in the order of their places; 0 for fewer than two."""
    if len(a) < 2:
        return 0.0
    first, second = (np.argsort(np.argsort(values, kind="stable")).astype(np.float64) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])
