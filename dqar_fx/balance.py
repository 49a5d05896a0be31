"""Channel-wise salience balancing: no channel of what is stored stands out, so that its INT8 or INT4 serves all.

PTQ4DiT (Wu et al. 2024, arXiv:2405.16005) multiplies the channels of an activation by ``B_X`` and those of the weight
that it meets by ``B_W = 1 / B_X``. A stored key meets the query in ``q . k``; a stored output meets nothing but what
reads it.

* Keys are stored as ``k * B`` with ``B = sqrt(s(Q) / s(K))`` (eq. 4 to 7), and queries are multiplied by ``1 / B`` when
  they are read. ``B`` is rounded to a power of two: both products are then exact, in every dtype, and so is ``q . k``.
* Outputs are stored as ``x * B`` with ``B = 1 / sqrt(s(X))``, and divided by it in float32 when they are read: what
  an output meets is no one weight, and its salience is taken to be 1. (``B = 1 / s(X)``, which takes out all of it,
  leaves a smaller error in the output and a larger one in the images: salient channels are the ones that matter.)

A channel without salience (all zeros, or a value that is not finite) has ``B = 1``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dqar_fx.errors import CacheError

#: How far ``B`` of keys may be from 1, and a salience of outputs from the largest: beyond it, a product with what a
#: later step brings could leave the range of float16, or of float32.
LARGEST = 2.0**12
FORMAT = "dqar_fx.balance/1"
_EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent: without the others it is a power of two
_ONE_TWICE = 0x7F000000  # the bits of 1.0, twice: less those of a power of two, they are those of its inverse


# -- PTQ4DiT's equations ------------------------------------------------------------------------------------------


def salience(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """``s = max|x|`` over ``dims``, which stay with size 1 (PTQ4DiT eq. 4)."""
    return x.abs().amax(dims, keepdim=True)


def balancing_factors(own: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """``B_X = s~ / s(X)`` and ``B_W = s~ / s(W)`` with ``s~ = sqrt(s(X) s(W))`` (PTQ4DiT eq. 5 to 7).

    Shapes: saliences ``own`` (of X) and ``partner`` (of W), alike, positive -> two tensors like them; their product
    is 1. Computed as ``sqrt(s(W) / s(X))``, which is the same and overflows later.
    """
    return (partner / own).sqrt(), (own / partner).sqrt()


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation over the last dimension, equal values sharing their mean rank.

    Shapes: ``[..., C]`` twice -> ``[...]``, float64, in [-1, 1]. 0 where all values of one are equal.
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    size = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return torch.where(size > 0, (x * y).sum(-1) / size.where(size > 0, torch.ones_like(size)), 0.0)


def calibrated_salience(saliences: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """One salience for all timesteps, ``s_rho = sum_t eta_t s(X_t)``, ``eta = softmax_t(-rho_t)`` (eq. 10 and 11).

    ``rho_t`` is the rank correlation of the saliences of X and W at timestep t. It is low where X has room for the
    salience of W and the reverse: these timesteps count most.

    Shapes: ``saliences [T, ..., C]``; ``partners`` alike, or ``[..., C]`` where W is the same at every timestep ->
    ``s_rho [..., C]`` and ``eta [T, ...]``, float64.
    """
    eta = torch.softmax(-rank_correlation(saliences, partners.expand_as(saliences)), 0)
    return (eta.unsqueeze(-1) * saliences.double()).sum(0), eta


def _ranks(x: Tensor) -> Tensor:
    less, equal = (compare(x.unsqueeze(-1), x.unsqueeze(-2)).double().sum(-1) for compare in (torch.gt, torch.eq))
    return less + (equal + 1) / 2


# -- what a graph computes: no branch on data or shape, so that all of this can be traced -------------------------


def key_factors(key: Tensor, partner: Tensor) -> Tensor:
    """``B`` of keys from their salience and that of the queries, alike; float32 powers of two."""
    own, partner = key.float(), partner.float()
    factors, _ = balancing_factors(own, partner)
    usable = (own > 0) & (partner > 0) & (own + partner).isfinite()
    return torch.where(usable, power_of_two(factors.clamp(1 / LARGEST, LARGEST)), 1.0)


def output_factors(own: Tensor) -> Tensor:
    """``B = 1 / sqrt(s(X))`` of an output from its salience ``[..., C]``; float32."""
    own = own.float()
    finite = torch.where(own.isfinite(), own, 0.0)
    floor = finite.amax(-1, keepdim=True) / LARGEST
    raised = torch.maximum(finite, floor)
    return torch.where((raised > 0) & own.isfinite(), raised.rsqrt(), 1.0)


def query_salience(query: Tensor, groups: int) -> Tensor:
    """Salience of the queries that meet each head of keys: ``[..., H * groups, N, d]`` -> ``[..., H, 1, d]``."""
    found = salience(query, -2)
    if groups == 1:
        return found
    split: Tensor = found.unflatten(-3, (-1, groups))  # type: ignore[no-untyped-call]  # torch's own
    return split.amax(-3)


def fold_into_query(query: Tensor, factors: Tensor, groups: int) -> Tensor:
    """``query / B``, exactly: ``[..., H * groups, N, d]`` with ``factors [..., H, 1, d]`` of the keys."""
    inverse = (_ONE_TWICE - factors.view(torch.int32)).view(torch.float32).to(query.dtype)
    return query * (inverse if groups == 1 else inverse.repeat_interleave(groups, -3))


def power_of_two(x: Tensor) -> Tensor:
    """The power of two that is nearest to ``x`` in ratio; ``x`` is float32, positive, and no subnormal."""
    return ((x * 2**0.5).view(torch.int32) & _EXPONENT).view(torch.float32)


# -- calibrated vectors -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Balance:
    """Calibrated factors of one model: what ``calibrate_balance`` returns and ``CacheConfig(balance=...)`` takes.

    Attributes:
        target: what they balance: ``"output"`` or ``"kv"`` (the keys).
        factors: by exit (the site's path, the number of the exit behind a slash), float32: ``[1, H, 1, d]`` for keys
            ``[B, H, N, d]``, powers of two; ``[1, ..., 1, D]`` for outputs.
        steps: how many calls of the model they were calibrated from.
        file: where they are saved, "" if they are not.

    Raises:
        CacheError: a factor that is not finite and positive, or, of keys, no power of two.
    """

    target: str
    factors: Mapping[str, Tensor]
    steps: int
    file: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name, factor in self.factors.items():
            good = factor.dtype == torch.float32 and bool((factor.isfinite() & (factor > 0)).all())
            if good and self.target == "kv":
                good = bool((factor.frexp().mantissa == 0.5).all())
            if not good:
                what = "powers of two" if self.target == "kv" else "positive numbers"
                raise CacheError(f"the balancing factors of {name} are not all {what} in float32. Calibrate them anew.")

    def save(self, path: str | Path) -> Balance:
        """Write a safetensors file, and return the balance that knows where it is (``str(CacheConfig)`` names it)."""
        from safetensors.torch import save_file

        facts = {"format": FORMAT, "target": self.target, "steps": self.steps}
        save_file(dict(self.factors), path, metadata={"dqar_fx": json.dumps(facts)})
        return Balance(self.target, self.factors, self.steps, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Balance:
        """What ``save`` wrote.

        Raises:
            CacheError: the file is not there, or not of this kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as opened:
                facts = json.loads((opened.metadata() or {}).get("dqar_fx", "{}"))
                factors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise CacheError(
                f"the balance {str(path)!r} cannot be read: {error}. Write one with `dqar-fx explain MODEL --calibrate "
                f"--save-balance FILE`, or Balance.save."
            ) from error
        if facts.get("format") != FORMAT:
            raise CacheError(f"{path} holds no balance: its format is {facts.get('format')!r}, not {FORMAT!r}.")
        return cls(facts["target"], factors, facts["steps"], str(path))

    def of(self, name: str, shape: Sequence[object]) -> Tensor:
        """The factors of an exit, broadcast against a value of ``shape``.

        Raises:
            CacheError: there are none, or they have other sizes: the balance is another model's.
        """
        factors = self.factors.get(name)
        if factors is None:
            known = ", ".join(sorted(self.factors)[:3])
            raise CacheError(
                f"the balance has no factors for {name} (it has them for {known}, ...): it was calibrated for another "
                f"model, or with other sites. Calibrate it for this one, or use balance='dynamic'."
            )
        fits = len(factors.shape) == len(shape) and all(
            size in (1, other) for size, other in zip(factors.shape, shape, strict=True)
        )
        if not fits or factors.shape[-1] != shape[-1]:
            raise CacheError(
                f"the balance of {name} has shape {list(factors.shape)}, which does not fit {[str(s) for s in shape]}: "
                f"it was calibrated for another model. Calibrate it for this one, or use balance='dynamic'."
            )
        return factors
