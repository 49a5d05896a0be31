"""The learned policy (DQAR, R39 and C13): a small network that says how likely a reuse is to be harmless.

``p = sigmoid(MLP(features))``, by default of DQAR's five features and two hidden layers of 32 (1281 parameters). It is
evaluated on the host, in NumPy, once a step for all the sites that the other gates let pass. Nobody has a policy that
was not trained for them: ``dqar-fx trace`` records what single reuses do to a model's samples, ``dqar-fx train-policy``
learns from it, and ``Gates(policy=Policy.load("policy.safetensors"))`` asks it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dqar_fx.errors import PolicyError

if TYPE_CHECKING:
    from dqar_fx.gates import Candidate
    from dqar_fx.traces import Traces

__all__ = ["ALL_FEATURES", "FEATURES", "Policy", "feature"]

Array = npt.NDArray[np.float64]

#: DQAR's (S4, C13).
FEATURES = ("entropy", "log_snr", "log_norm", "progress", "prompt")
#: Prompts of this many tokens and more are all alike to a policy.
LONGEST_PROMPT = 128
#: Noise levels from 1e-6 to 1e6 are told apart: at pure noise, flow matching has a signal of exactly 0.
SNR_RANGE = (1e-6, 1e6)
#: A policy is to cost next to nothing (R39): fewer parameters than this.
MAX_PARAMETERS = 500_000
#: Rows of each attention that are looked at where no ``EntropyGate`` says how many; its default.
ENTROPY_ROWS = 256

FORMAT = "dqar_fx.policy"
VERSION = 1
_TENSORS = ("mean", "std", "low", "high")


def _log_snr(candidate: Candidate) -> float:
    snr = candidate.snr
    return snr if math.isnan(snr) else math.log(min(max(snr, SNR_RANGE[0]), SNR_RANGE[1]))


def _log_norm(candidate: Candidate) -> float:
    norm = candidate.latent_norm
    return math.log(norm) if norm > 0 else math.nan


def _depth(candidate: Candidate) -> float:
    return candidate.site / max(candidate.num_sites - 1, 1)


def _entropy(candidate: Candidate) -> float:
    return candidate.measured.entropy


def _entropy_in_nats(candidate: Candidate) -> float:
    bound = candidate.entropy_bound
    return candidate.measured.entropy / bound if 0 < bound < math.inf else math.nan


#: What a policy may be told of a reuse, by name; NaN where it is not known (yet), which blocks.
_FEATURES: dict[str, Callable[[Candidate], float]] = {
    "entropy": _entropy,
    "log_snr": _log_snr,
    "log_norm": _log_norm,
    "progress": lambda c: c.step / c.num_steps,
    "prompt": lambda c: min(c.prompt_length or 0, LONGEST_PROMPT) / LONGEST_PROMPT,
    "age": lambda c: float(c.age),
    "reuses": lambda c: float(c.reuses),
    "depth": _depth,
    "change": lambda c: c.measured.change,
    "step": lambda c: float(c.step),
    "site": lambda c: float(c.site),
}
ALL_FEATURES = tuple(_FEATURES)


def feature(name: str, candidate: Candidate, *, in_nats: bool = False) -> float:
    """One feature of a candidate; NaN where it is not known.

    ============ ======================================================================================
    ``entropy``  of the attention when it was last measured, over that of uniform attention: in [0, 1]
    ``log_snr``  ``ln SNR`` of the noise schedule at this step, SNR within 1e-6 and 1e6
    ``log_norm`` ``ln ||x_t||_2`` of the model's latents two steps before, mean of the norms over samples
    ``progress`` ``step / num_steps``
    ``prompt``   ``min(tokens, 128) / 128``; 0 without a prompt
    ``age``      steps since the stored value was computed
    ``reuses``   how often it was read since
    ``depth``    ``site / (num_sites - 1)``
    ``change``   of the result when it was last computed, relative to its size
    ``step``     counted from 0
    ``site``     its number
    ============ ======================================================================================

    The first five are DQAR's. ``in_nats``: the entropy was measured in nats a row, and is divided by ``ln(keys)``.
    That is the same, but where a mask leaves rows fewer keys than there are.
    """
    return _reader(name, in_nats)(candidate)


def _reader(name: str, in_nats: bool) -> Callable[[Candidate], float]:
    return _entropy_in_nats if in_nats and name == "entropy" else _FEATURES[name]


@runtime_checkable
class Judge(Protocol):
    """What decides on all sites of a step at once: a policy, or what stands in for one (the recorder of traces)."""

    @property
    def features(self) -> tuple[str, ...]:
        """What it has to be told, by name."""

    @property
    def min_probability(self) -> float:
        """From which probability on a value is read."""

    def probabilities(self, rows: Array) -> Array:
        """Of each reuse to be harmless, ``[n]``; ``rows [n, features]``. NaN blocks."""


@dataclass(frozen=True, slots=True)
class PolicyGate:
    """The last gate of the cascade. Under ``optimize`` it is asked once a step, for all sites together.

    Args:
        judge: the policy.
        in_nats: entropies come in nats a row, as the ``EntropyGate`` asks for them.
    """

    judge: Judge
    in_nats: bool = False
    reason: str = field(default="policy", init=False)
    _readers: tuple[Callable[[Candidate], float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_readers", tuple(_reader(name, self.in_nats) for name in self.judge.features))

    def __str__(self) -> str:
        return str(self.judge)

    def row(self, candidate: Candidate) -> list[float]:
        """The candidate as the policy is told of it."""
        return [read(candidate) for read in self._readers]

    def allow(self, rows: Sequence[Sequence[float]]) -> list[bool]:
        """For each row, whether the value may be read."""
        allowed: list[bool] = (self.judge.probabilities(np.array(rows)) >= self.judge.min_probability).tolist()
        return allowed

    def probability(self, candidate: Candidate) -> float:
        """Of one candidate, asked alone."""
        return float(self.judge.probabilities(np.array([self.row(candidate)]))[0])

    def allows(self, candidate: Candidate) -> bool:
        """``probability >= min_probability``; not where a feature is not known."""
        return self.probability(candidate) >= self.judge.min_probability


@dataclass(frozen=True, eq=False, kw_only=True)
class Policy:
    """How likely a reuse is to be harmless, as learned from traces; made by :meth:`train` or :meth:`load`.

    A multilayer perceptron: features are standardised (after a value outside of what was seen in training is replaced
    by the nearest that was: it is not asked what it cannot know), go through hidden layers with tanh, and come out as
    one number, the log-odds.

    Args:
        weights: of each layer ``[out, in]``, the last with one output.
        biases: of each layer, ``[out]``.
        mean: of each feature in training, ``[F]``.
        std: its standard deviation, ``[F]``, positive (1 for a feature that was constant).
        low: the smallest value in training, ``[F]``.
        high: the largest, ``[F]``.
        features: what goes in, in order; names of ``ALL_FEATURES``.
        min_probability: a stored value is read where the probability is at least this. Another limit on the same
            network: ``dataclasses.replace(policy, min_probability=0.7)``.
        training: numbers of its training, for people.

    Raises:
        PolicyError: shapes that do not fit, numbers that are not finite, 0.5 million parameters or more, an unknown
            feature, a probability out of [0, 1].
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    mean: Array
    std: Array
    low: Array
    high: Array
    features: tuple[str, ...] = FEATURES
    min_probability: float = 0.5
    training: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        def wide(values: Any) -> Array:
            array = np.array(values, dtype=np.float64)
            array.setflags(write=False)
            return array

        for name in _TENSORS:
            object.__setattr__(self, name, wide(getattr(self, name)))
        for name in ("weights", "biases"):
            object.__setattr__(self, name, tuple(wide(values) for values in getattr(self, name)))
        object.__setattr__(self, "features", tuple(self.features))
        check_features(self.features)
        probability: object = self.min_probability
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
            raise PolicyError(f"Policy.min_probability is {probability!r}. Give a number from 0 to 1.")
        self._check_shapes()

    def _check_shapes(self) -> None:
        width = len(self.features)
        for name in _TENSORS:
            if getattr(self, name).shape != (width,):
                raise PolicyError(
                    f"Policy.{name} has shape {getattr(self, name).shape}, but there are {width} features: "
                    f"{', '.join(self.features)}. Give one number each."
                )
        if not self.weights or len(self.weights) != len(self.biases):
            raise PolicyError(f"Policy has {len(self.weights)} weights and {len(self.biases)} biases. Give one each.")
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1] or not len(bias):
                raise PolicyError(
                    f"Policy: layer {index} has weights {weight.shape} and biases {bias.shape}, but {width} values "
                    f"come in. Give [out, {width}] and [out]."
                )
            width = weight.shape[0]
        if width != 1:
            raise PolicyError(f"Policy: the last layer has {width} outputs. One is needed, the log-odds.")
        if not all(np.isfinite(values).all() for values in self.tensors().values()):
            raise PolicyError("Policy: a number of the network is not finite. Train it anew.")
        if not (self.std > 0).all() or not (self.low <= self.high).all():
            raise PolicyError("Policy: std must be positive, and low at most high. Train it anew.")
        if self.num_parameters >= MAX_PARAMETERS:
            raise PolicyError(
                f"Policy has {self.num_parameters} parameters; fewer than {MAX_PARAMETERS} are allowed, as it runs on "
                f"the host at every step. Make the hidden layers smaller."
            )

    @property
    def hidden(self) -> tuple[int, ...]:
        """Sizes of the hidden layers."""
        return tuple(len(bias) for bias in self.biases[:-1])

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return sum(values.size for values in (*self.weights, *self.biases))

    def tensors(self) -> dict[str, Array]:
        """All numbers by the names they are saved under: ``layers.<i>.weight``, ``layers.<i>.bias``, ``mean``, ..."""
        found = {name: getattr(self, name) for name in _TENSORS}
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            found |= {f"layers.{index}.weight": weight, f"layers.{index}.bias": bias}
        return found

    def probabilities(self, rows: Array) -> Array:
        """The probability that each of several reuses is harmless: ``[n, F]`` -> ``[n]``, NaN where a feature is."""
        x = (np.clip(rows, self.low, self.high) - self.mean) / self.std
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = np.tanh(x @ weight.T + bias)
        odds = (x @ self.weights[-1].T + self.biases[-1])[:, 0]
        return 0.5 * (1 + np.tanh(0.5 * odds))  # the sigmoid, without overflow

    def probability(self, features: Mapping[str, float] | Sequence[float]) -> float:
        """The probability that a single reuse is harmless.

        Args:
            features: by name, or in the order of ``self.features``.

        Raises:
            PolicyError: one is missing, or there are others.
        """
        if isinstance(features, Mapping):
            missing = [name for name in self.features if name not in features]
            if missing:
                raise PolicyError(f"probability() was not given {', '.join(missing)}. This policy has to be told them.")
            features = [features[name] for name in self.features]
        if len(features) != len(self.features):
            raise PolicyError(
                f"probability() got {len(features)} features. This policy has {len(self.features)}: "
                f"{', '.join(self.features)}."
            )
        return float(self.probabilities(np.array([features], dtype=np.float64))[0])

    def __str__(self) -> str:
        others = "" if self.features == FEATURES else f", features={'+'.join(self.features)}"
        return f"Policy({'x'.join(map(str, self.hidden))}, min_probability={self.min_probability:g}{others})"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the network to ``path`` (``.safetensors``, float32) and what belongs to it to a ``.json`` beside it.

        ``min_probability`` may be edited there; ``training`` is what is known of its quality.

        Returns:
            The path.

        Raises:
            PolicyError: the name does not end in ``.safetensors``.
        """
        from safetensors.numpy import save

        target, beside = _files(path)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "features": list(self.features),
            "hidden": list(self.hidden),
            "parameters": self.num_parameters,
            "min_probability": self.min_probability,
            "training": dict(self.training),
        }
        text = json.dumps(document, indent=2) + "\n"
        target.write_bytes(save({name: values.astype(np.float32) for name, values in self.tensors().items()}))
        beside.write_text(text, encoding="utf-8")
        return target

    @staticmethod
    def load(path: str | os.PathLike[str], *, min_probability: float | None = None) -> Policy:
        """Read a policy that :meth:`save` (or ``dqar-fx train-policy``) wrote.

        Args:
            path: of the ``.safetensors`` file; the ``.json`` beside it is read too.
            min_probability: in place of the one in the file.

        Raises:
            PolicyError: a file is not what it should be; the message names it.
            OSError: a file cannot be opened.
        """
        target, beside = _files(path)
        data = target.read_bytes()
        try:
            document = json.loads(beside.read_bytes())
        except FileNotFoundError as error:
            raise PolicyError(f"{beside} is missing: a policy is two files. Copy it beside {target.name}.") from error
        except (ValueError, RecursionError) as error:
            raise PolicyError(
                f"{beside} is not JSON ({error}). Train the policy anew, or copy the file again."
            ) from error
        found = _from_files(data, document, target, beside)
        return found if min_probability is None else replace(found, min_probability=min_probability)

    @staticmethod
    def train(traces: Traces | str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **settings: Any) -> Policy:
        """Learn from traces; see ``dqar_fx.policy_training.train`` for the settings and the loss.

        Args:
            traces: as ``dqar_fx.traces.load`` gives them, or the files that ``dqar-fx trace`` wrote.
            settings: ``hidden=(32, 32)``, ``features=FEATURES``, ``harmless=0.5``, ``seed=0``, ...

        Raises:
            PolicyError: too few traces, or a setting out of range.
        """
        from dqar_fx.policy_training import train
        from dqar_fx.traces import Traces, load

        return train(traces if isinstance(traces, Traces) else load(traces), **settings)


def check_features(names: Sequence[str]) -> None:
    """Refuse names that are no features, none at all, and one that comes twice.

    Raises:
        PolicyError: so it is.
    """
    unknown = [name for name in names if name not in ALL_FEATURES]
    if unknown or not names or len(set(names)) < len(names):
        what = f"unknown: {', '.join(map(repr, unknown))}" if unknown else "each once, at least one"
        raise PolicyError(f"features are {list(names)} ({what}). There are {', '.join(ALL_FEATURES)}.")


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file of the network and the one beside it."""
    target = Path(path)
    if target.suffix != ".safetensors":
        raise PolicyError(
            f"{target}: the name of a policy ends in .safetensors; what belongs to it is in a .json beside."
        )
    return target, target.with_suffix(".json")


def _from_files(data: bytes, document: Any, target: Path, beside: Path) -> Policy:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PolicyError(f'{beside} has no "format": "{FORMAT}". Policies are written by dqar-fx train-policy.')
    if document.get("version") != VERSION:
        raise PolicyError(
            f"{beside} has version {document.get('version')!r}, and this dqar_fx reads {VERSION}. Update dqar_fx, or "
            f"train the policy anew."
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise PolicyError(f"{target} is not a safetensors file ({error}). Copy it again, or train anew.") from error
    layers = sum(name.endswith(".weight") for name in tensors)
    names = [f"layers.{index}.{part}" for part in ("weight", "bias") for index in range(layers)]
    if set(tensors) != {*names, *_TENSORS}:
        raise PolicyError(f"{target} holds {sorted(tensors)}, which are not the tensors of a policy. Train it anew.")
    features, training = document.get("features"), document.get("training", {})
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise PolicyError(f'{beside}: "features" is {features!r}, not a list of names.')
    try:
        return Policy(
            weights=tuple(tensors[name] for name in names[:layers]),
            biases=tuple(tensors[name] for name in names[layers:]),
            **{name: tensors[name] for name in _TENSORS},
            features=tuple(features),
            min_probability=document.get("min_probability"),  # type: ignore[arg-type]  # checked where it is made
            training=training if isinstance(training, dict) else {},
        )
    except PolicyError as error:
        raise PolicyError(f"{target} and {beside.name} are no policy: {error}") from error
