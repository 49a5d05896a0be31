"""Salience balancing: PTQ4DiT's equations against references in float64, and what is undone without a trace."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor

from dqar_fx import Balance, CacheConfig, CacheError, Controller, Schedule
from dqar_fx.balance import (
    LARGEST,
    balancing_factors,
    calibrated_salience,
    fold_into_query,
    key_factors,
    output_factors,
    power_of_two,
    query_salience,
    rank_correlation,
    salience,
)
from dqar_fx.graph.specialise import GIVEN, ExitLayout

#: Relative, as the quantiser and the metrics.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
KEYS = CacheConfig("kv", balance="dynamic")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_dtype
def test_the_factors_are_those_of_equations_4_to_7(dtype: torch.dtype) -> None:
    x, w = normal(2, 7, 5).to(dtype), normal(2, 9, 5, seed=1).to(dtype) * 30
    b_x, b_w = balancing_factors(salience(x, -2), salience(w, -2))
    for sample in range(2):
        for channel in range(5):
            of_x = max(abs(float(v)) for v in x[sample, :, channel])
            of_w = max(abs(float(v)) for v in w[sample, :, channel])
            balanced = math.sqrt(of_x * of_w)
            assert float(b_x[sample, 0, channel]) == pytest.approx(balanced / of_x, rel=TOLERANCE[dtype])
            assert float(b_w[sample, 0, channel]) == pytest.approx(balanced / of_w, rel=TOLERANCE[dtype])
    # What they are for: both are equally salient now, and nothing has changed in the product.
    torch.testing.assert_close(salience(x * b_x, -2), salience(w * b_w, -2))
    torch.testing.assert_close(x * b_x @ (w * b_w).mT, x @ w.mT)


@every_dtype
@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_is_scipys(dtype: torch.dtype, ties: bool) -> None:
    a, b = normal(6, 3, 11).to(dtype), normal(6, 3, 11, seed=1).to(dtype)
    if ties:
        a, b = a.round(), b.round()
    found = rank_correlation(a, b)
    for index in np.ndindex(6, 3):
        expected = stats.spearmanr(a[index].numpy(), b[index].numpy()).statistic
        assert float(found[index]) == pytest.approx(expected, rel=1e-9)
    assert float(rank_correlation(torch.ones(4), torch.arange(4.0))) == 0  # nothing to rank


@every_dtype
@pytest.mark.parametrize("fixed", [False, True])
def test_salience_is_calibrated_by_equations_10_and_11(dtype: torch.dtype, fixed: bool) -> None:
    steps, channels = 6, 9
    of_x, of_w = normal(steps, channels).abs().to(dtype), normal(steps, channels, seed=1).abs().to(dtype)
    of_w = of_w[0] if fixed else of_w
    found, eta = calibrated_salience(of_x, of_w)
    rho = [stats.spearmanr(of_x[t].numpy(), (of_w if fixed else of_w[t]).numpy()).statistic for t in range(steps)]
    weights = [math.exp(-r) / sum(math.exp(-other) for other in rho) for r in rho]
    np.testing.assert_allclose(eta.numpy(), weights, rtol=TOLERANCE[dtype])
    expected = sum(weight * of_x[t].double().numpy() for t, weight in enumerate(weights))
    np.testing.assert_allclose(found.numpy(), expected, rtol=TOLERANCE[dtype])


def test_heads_are_calibrated_each_by_itself() -> None:
    of_x, of_w = normal(4, 1, 2, 1, 8).abs(), normal(4, 1, 2, 1, 8, seed=1).abs()
    found, _ = calibrated_salience(of_x, of_w)
    for head in range(2):
        alone, _ = calibrated_salience(of_x[:, 0, head, 0], of_w[:, 0, head, 0])
        torch.testing.assert_close(found[0, head, 0], alone)


def test_a_power_of_two_is_the_nearest_in_ratio_and_exact() -> None:
    x = torch.cat([2.0 ** torch.arange(-30, 31), normal(1000).float().exp()])
    found = power_of_two(x)
    mantissa, _ = found.frexp()
    assert (mantissa == 0.5).all()
    assert ((found / x).log2().abs() <= 0.5 + 1e-6).all()
    assert torch.equal(found[:61], x[:61])


def test_keys_get_the_rounded_factors_and_damage_none() -> None:
    own = torch.tensor([1.0, 4.0, 1e-9, 0.0, 3.0, math.nan, math.inf, 2.0])
    partner = torch.tensor([4.0, 1.0, 1e9, 1.0, 0.0, 1.0, 1.0, math.nan])
    assert key_factors(own, partner).tolist() == [2.0, 0.5, LARGEST, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_outputs_lose_half_of_their_salience_and_damage_is_left_alone() -> None:
    own = torch.tensor([8.0, 2.0, 0.0, 1e-9, math.nan, math.inf])
    most = math.sqrt(LARGEST / 8)
    torch.testing.assert_close(output_factors(own), torch.tensor([8**-0.5, 2**-0.5, most, most, 1.0, 1.0]))
    assert output_factors(torch.zeros(3)).tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 3])
def test_what_is_folded_into_the_queries_changes_no_bit_of_a_product(dtype: torch.dtype, groups: int) -> None:
    key = (normal(2, 2, 5, 8) * normal(8, seed=1).exp()).to(dtype)
    query = normal(2, 2 * groups, 4, 8, seed=2).to(dtype)
    factors = key_factors(salience(key, -2), query_salience(query, groups))
    assert factors.unique().numel() > 1
    folded = fold_into_query(query, factors, groups)
    assert folded.dtype == dtype
    balanced = (key.double() * factors).repeat_interleave(groups, 1)
    products = query.double().unsqueeze(-2) * key.double().repeat_interleave(groups, 1).unsqueeze(-3)
    assert torch.equal(folded.double().unsqueeze(-2) * balanced.unsqueeze(-3), products)


def layout(ndim: int, *, of_keys: bool, balance: str = "dynamic", size: int = 0, groups: int = 1) -> ExitLayout:
    return ExitLayout(
        torch.float32, ndim, "token", None, size=size, group=size, balance=balance, of_keys=of_keys, groups=groups
    )


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [0, 32])  # INT8, INT4
def test_keys_with_salient_channels_lose_less_in_the_product_with_the_queries(size: int) -> None:
    key, query = normal(2, 3, 40, 32).float(), normal(2, 3, 24, 32, seed=1).float()
    key[..., 5] *= 60
    query[..., 5] /= 60  # PTQ4DiT's observation: where the one is salient the other is not
    exact = query @ key.mT
    plain = ExitLayout(torch.float32, 4, "token", None, size=size, group=size)
    balanced = layout(4, of_keys=True, size=size)
    without = relative(query @ plain.unpack(*plain.pack(key)).mT, exact)
    parts = balanced.pack(key, query)
    found = fold_into_query(query, parts[2], 1) @ balanced.unpack(*parts, folded=True).mT
    assert relative(found, exact) < without / 8
    # Undone in the keys it is the same: what the change of a value is measured by.
    torch.testing.assert_close(query @ balanced.unpack(*parts).mT, found)
    given = layout(4, of_keys=True, balance=GIVEN, size=size)
    for found, expected in zip(given.pack(key, parts[2]), parts[:2], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [0, 32])
def test_outputs_with_salient_channels_lose_less(size: int) -> None:
    x = normal(2, 40, 32).float()
    x[..., 7] *= 50
    rest = [c for c in range(32) if c != 7]
    plain = ExitLayout(torch.float32, 3, "token", None, size=size, group=size)
    balanced = layout(3, of_keys=False, size=size)
    parts = balanced.pack(x)
    assert parts[2].shape == (2, 1, 32)
    without = relative(plain.unpack(*plain.pack(x))[..., rest], x[..., rest])
    assert relative(balanced.unpack(*parts)[..., rest], x[..., rest]) < without / 2.5


def test_without_rounding_nothing_is_lost() -> None:
    """Values that INT8 holds exactly, and still does when channels are multiplied by powers of two."""
    levels = torch.randint(-127, 128, (2, 3, 6, 4), generator=torch.Generator().manual_seed(0)).float()
    levels[..., 0] = 127  # of every token the largest
    factors = torch.tensor([2.0, 0.5, 4.0, 8.0])
    key = (levels / factors).contiguous()
    given = layout(4, of_keys=True, balance=GIVEN)
    assert torch.equal(given.unpack(*given.pack(key, factors), factors), key)


def test_compiled_it_gives_the_same() -> None:
    """Inductor may multiply by a reciprocal where eager divides: a quotient on a tie may round to the other side."""
    own = layout(4, of_keys=True, groups=2)

    def there_and_back(key: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = own.pack(key, query)
        return own.unpack(*parts, folded=True), fold_into_query(query, parts[2], 2), parts[2]

    key, query = (normal(2, 2, 16, 8) * normal(8, seed=1).exp()).float(), normal(2, 4, 16, 8, seed=2).float()
    with torch.no_grad():
        found = torch.compile(there_and_back, fullgraph=True)(key, query)
    expected = there_and_back(key, query)
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[1], expected[1])
    off = ~torch.isclose(found[0], expected[0], rtol=1e-6, atol=0)
    assert off.count_nonzero() <= key.numel() // 1000


def test_a_damaged_token_damages_no_other() -> None:
    for x, beside in (
        (normal(2, 3, 6, 8).float(), (normal(2, 3, 6, 8, seed=1).float(),)),
        (normal(2, 6, 8).float(), ()),
    ):
        x[0, ..., 2, 4] = math.nan
        own = layout(x.ndim, of_keys=bool(beside))
        back = own.unpack(*own.pack(x, *beside))
        assert torch.equal(back.isnan().any(-1), x.isnan().any(-1))


# -- a balance, and how it is asked for -------------------------------------------------------------------------------


def some(target: str = "output") -> Balance:
    factors = {"a.attn/0": torch.tensor([[[0.5, 2.0, 1.0]]]), "b.attn/1": torch.tensor([[[4.0, 1.0, 0.25]]])}
    return Balance(target, factors, 7)


def test_a_saved_balance_is_loaded_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    saved = some("kv").save(file)
    again = Balance.load(file)
    assert (again.target, again.steps, again.file) == ("kv", 7, str(file)) == (saved.target, saved.steps, saved.file)
    assert again.factors.keys() == saved.factors.keys()
    assert all(torch.equal(again.factors[name], saved.factors[name]) for name in saved.factors)
    text = f"kv:int4:group32+balance={file}@cpu"
    config = CacheConfig.parse(text)
    assert isinstance(config.balance, Balance)
    assert str(config) == text


def test_what_is_no_balance_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    with pytest.raises(CacheError, match=r"cannot be read: .*--calibrate --save-balance FILE"):
        Balance.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(CacheError, match="cannot be read"):
        Balance.load(file)
    save_file({"x": torch.ones(2)}, file)
    with pytest.raises(CacheError, match="holds no balance: its format is None"):
        Balance.load(file)
    facts = {"format": "dqar_fx.balance/1", "target": "kv", "steps": 1}
    save_file({"a/0": torch.tensor([3.0])}, file, metadata={"dqar_fx": json.dumps(facts)})
    with pytest.raises(CacheError, match="factors of a/0 are not all powers of two"):
        Balance.load(file)
    with pytest.raises(CacheError, match="factors of a/0 are not all positive"):
        Balance("output", {"a/0": torch.tensor([1.0, 0.0])}, 1)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("c.attn/0", (2, 9, 3), r"no factors for c\.attn/0 \(it has them for a\.attn/0, b\.attn/1, \.\.\.\)"),
        ("a.attn/0", (2, 9, 4), r"has shape \[1, 1, 3\], which does not fit"),
        ("a.attn/0", (9, 3), "does not fit"),
    ],
)
def test_another_models_balance_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        some().of(name, shape)
    assert some().of("a.attn/0", (2, 9, 3)).tolist() == [[[0.5, 2.0, 1.0]]]


@pytest.mark.parametrize("text", ["int8:token+balance", "kv:int8/native:head+balance", "int4:group32+balance@cpu"])
def test_text_round_trips(text: str) -> None:
    assert str(CacheConfig.parse(text)) == text
    assert CacheConfig.parse(text).balance == "dynamic"
    assert CacheConfig().balance is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("native+balance", "outputs are stored in the model's own dtype: there is no rounding"),
        ("kv:native/int8+balance", "keys are stored in the model's own dtype"),
        ("int8:channel+balance", "each channel has a scale of its own"),
        ("int8+balanced", r"says 'd' behind \+balance\. Use \+balance or \+balance=FILE"),
        ("int8+balance=", r"says '=' behind"),
        ("int8+balance=nowhere.safetensors", "cannot be read"),
    ],
)
def test_a_balance_that_has_no_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        CacheConfig.parse(text)


def test_a_balance_is_of_its_target_and_of_a_known_kind() -> None:
    with pytest.raises(CacheError, match="calibrated for target='output', and target is 'kv'"):
        CacheConfig("kv", balance=some())
    with pytest.raises(CacheError, match=r"CacheConfig\.balance is 'static'\. Use None, 'dynamic', or a Balance"):
        CacheConfig(balance="static")
    assert str(CacheConfig(balance=some())) == "int8:token+balance=(calibrated)"


def test_a_controller_does_not_balance() -> None:
    with pytest.raises(CacheError, match="does not know whose channels"):
        Controller(Schedule.always(3), 1, cache=CacheConfig(balance="dynamic"))
