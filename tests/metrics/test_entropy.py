"""Attention entropy against its definition in float64, and what its computation allocates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqar_fx.metrics import MetricError, attention_entropy, entropy_in_graph, row_entropy

B, H, N, M, D = 2, 4, 33, 70, 16
RTOL = {torch.float64: 1e-5, torch.float32: 2e-4}
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def queries(*shape: int, seed: int = 0, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape or (B, H, N, D), generator=generator, dtype=torch.float64)).to(dtype)


def keys(*shape: int, **options: Any) -> Tensor:
    return queries(*(shape or (B, H, M, D)), seed=1, **options)


def masks() -> dict[str, Tensor | None]:
    """One of each kind; the first key is in everywhere, so that no row is empty."""
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(B, H, N, M, generator=generator) > 0.4
    some[..., 0] = True
    added = 2 * torch.randn(B, H, N, M, generator=generator)
    return {
        "none": None,
        "keys": some[:, :1, :1],
        "keys, per head": some[:, :, :1],
        "of one row": some[0, 0, :1],
        "of dimension one": some[0, 0, 0],
        "rows and keys": some[:, :1],
        "rows and keys, two dimensions": some[0, 0],
        "rows only": torch.ones(N, 1, dtype=torch.bool),
        "added to keys": added[:, :1, :1],
        "added to keys, -inf": added[:, :1, :1].masked_fill(~some[:, :1, :1], -math.inf),
        "added to keys, -10000": added[:, :1, :1].masked_fill(~some[:, :1, :1], -10000),
        "added to keys, lowest": added[:, :1, :1].masked_fill(~some[:, :1, :1], torch.finfo(torch.float32).min),
        "added to all": added,
        "added to all, -inf": added.masked_fill(~some, -math.inf),
        "causal": torch.ones(N, M, dtype=torch.bool).tril(),
    }


def reference(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``-sum_j A_ij ln A_ij``, ``[B, H, N]``, as one would write it down."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.exp() if scores.max() < 500 else (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return -torch.where(weights > 0, weights * weights.log(), 0).sum(-1)


def close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", masks())
def test_it_is_the_definition(kind: str, dtype: torch.dtype) -> None:
    q, k, mask = queries(dtype=dtype), keys(dtype=dtype), masks()[kind]
    expected = reference(q, k, mask)
    result = attention_entropy(q, k, mask=mask)
    assert result.dtype == dtype
    close(result, expected.mean((1, 2)), RTOL[dtype])
    close(attention_entropy(q, k, mask=mask, normalize="sum"), expected.sum(-1), RTOL[dtype])


@pytest.mark.parametrize("kind", masks())
def test_row_by_row_and_by_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, mask = queries(), keys(), masks()[kind]
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], M).reshape(*[1] * (4 - mask.ndim), *mask.shape[:-1], M)
    by_kernel = row_entropy.row_entropy(q, k, mask, False, 0.25)
    monkeypatch.setattr(row_entropy, "_has_kernel", lambda *_: False)
    monkeypatch.setattr(row_entropy, "BLOCK_SCORES", 10 * B * H * M)  # blocks of 10, 10, 10 and 3 rows
    by_blocks = row_entropy.row_entropy(q, k, mask, False, 0.25)
    expected = reference(q, k, mask, 0.25)
    close(by_kernel, expected, 2e-4, atol=5e-6)
    close(by_blocks, expected, 2e-4, atol=5e-6)


def test_causal_is_the_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (N, M, 90):  # fewer, as many and more queries than keys
        q, k = queries(B, H, n, D), keys()
        expected = reference(q, k, torch.ones(n, M, dtype=torch.bool).tril()).mean((1, 2))
        close(attention_entropy(q, k, is_causal=True), expected, 2e-4)
        with monkeypatch.context() as patch:
            patch.setattr(row_entropy, "_has_kernel", lambda *_: False)
            patch.setattr(row_entropy, "BLOCK_SCORES", 10 * B * H * M)
            close(attention_entropy(q, k, is_causal=True), expected, 2e-4)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_fewer_key_heads(heads: int) -> None:
    q, k = queries(), keys(B, heads, M, D)
    close(attention_entropy(q, k), reference(q, k).mean((1, 2)), 2e-4)
    close(entropy_in_graph(q, k, enable_gqa=True), reference(q, k).mean((1, 2)), 2e-4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 0.0, -0.5])
def test_scale(scale: float) -> None:
    q, k, mask = queries(), keys(), masks()["added to keys"]
    close(attention_entropy(q, k, scale=scale, mask=mask), reference(q, k, mask, scale).mean((1, 2)), 2e-4)


@pytest.mark.parametrize("layout", ["channels last", "every second channel", "expanded"])
def test_layouts_that_the_kernel_misreads(layout: str) -> None:
    """The CPU kernel ignores the stride of the channels and computes something else, without an error."""
    q, k = queries(), keys()
    if layout == "channels last":
        q, k = q.mT.contiguous().mT, k.mT.contiguous().mT
    elif layout == "every second channel":
        q, k = queries(B, H, N, 2 * D)[..., ::2], keys(B, H, M, 2 * D)[..., ::2]
    else:
        q, k = q[..., :1].expand(-1, -1, -1, D), k[:, :1].expand(-1, H, -1, -1)
    close(attention_entropy(q, k), reference(q, k).mean((1, 2)), 2e-4)


@pytest.mark.parametrize("spread", [10.0, 30.0, 100.0])
def test_large_logits(spread: float) -> None:
    """Scores of 1e2 to 1e4: the difference cancels, to an error of a few units in the last place of the scores."""
    q, k = queries(spread=spread), keys(spread=spread)
    rows = row_entropy.row_entropy(q, k, None, False, 0.25)
    error = (rows - reference(q, k)).abs().max().item()
    assert rows.min() >= 0
    assert error <= 8 * torch.finfo(torch.float32).eps * spread**2 * D
    close(attention_entropy(q.double(), k.double()), reference(q, k).mean((1, 2)), 1e-5, atol=1e-9)


def test_never_negative() -> None:
    """One key takes all the weight: 0, where the difference alone comes out below it for some rows."""
    q, k = queries(1, 1, 512, 64, spread=50), keys(1, 1, 64, 64, spread=50)
    mean_key, lse = row_entropy._attend(q, k, None, False, 1.0)
    assert (lse - (q * mean_key).sum(-1)).min() < 0
    assert attention_entropy(q, k, scale=1.0).item() >= 0
    assert row_entropy.row_entropy(q, k, None, False, 1.0).min() == 0


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1)])
@pytest.mark.parametrize("normalize", ["row", "keys", "sum"])
def test_one_key_is_no_choice(normalize: str, mask: Tensor | None) -> None:
    result = attention_entropy(queries(), keys(B, H, 1, D), normalize=normalize, mask=mask)
    assert result.shape == ((B, H) if normalize == "sum" else (B,))
    close(result, torch.zeros_like(result), 0, atol=1e-5)


def test_uniform_attention_is_one_at_any_size_and_mask() -> None:
    q = torch.zeros(B, H, N, D)
    for m in (2, 77, 300):
        k = keys(B, H, m, D)
        close(attention_entropy(q, k), torch.full((B,), math.log(m)), 1e-6)
        close(attention_entropy(q, k, normalize="keys"), torch.ones(B), 1e-6)
        out = torch.arange(m) < torch.tensor([2, m])[:, None, None, None]  # two keys for one sample, all for the other
        for mask in (out, torch.where(out, 0.0, -math.inf), torch.where(out, 0.0, -10000.0)):
            close(attention_entropy(q, k, mask=mask), torch.tensor([math.log(2), math.log(m)]), 1e-5)
            close(attention_entropy(q, k, mask=mask, normalize="keys"), torch.ones(B), 1e-5)


def test_keys_divides_each_row_by_its_own_keys() -> None:
    q, k = queries(), keys()
    mask = torch.ones(N, M, dtype=torch.bool).tril()
    left = torch.arange(1, N + 1)
    expected = (reference(q, k, mask) / left.clamp(min=2).log()).mean((1, 2))
    close(attention_entropy(q, k, is_causal=True, normalize="keys"), expected, 2e-4)
    close(attention_entropy(q, k, mask=mask, normalize="keys"), expected, 2e-4)
    close(attention_entropy(q, k, normalize="keys"), reference(q, k).mean((1, 2)) / math.log(M), 2e-4)


@pytest.mark.parametrize("added", [False, True])
def test_rows_without_keys_are_left_out(added: bool) -> None:
    q, k = queries(), keys()
    mask = torch.rand(B, 1, N, M, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[0, :, 5:] = False  # five rows are left to the first sample
    mask[1] = False  # and none to the second
    expected = reference(q[:, :, :5], k, mask[:, :, :5])[0]
    given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if added else mask
    close(attention_entropy(q, k, mask=given), torch.tensor([expected.mean(), 0.0]), 2e-4)
    summed = attention_entropy(q, k, mask=given, normalize="sum")
    close(summed, torch.stack([expected.sum(-1), torch.zeros(H)]), 2e-4)


@pytest.mark.parametrize("added", [False, True])
def test_a_sample_without_keys_leaves_the_others_alone(added: bool) -> None:
    q, k = queries(), keys()
    mask = torch.ones(B, 1, 1, M, dtype=torch.bool)
    mask[1] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if added else mask
    for normalize in ("row", "keys"):
        result = attention_entropy(q, k, mask=given, normalize=normalize)
        close(result[:1], attention_entropy(q[:1], k[:1], normalize=normalize), 1e-5)
        assert result[1] == 0


@pytest.mark.parametrize("value", [-10000.0, torch.finfo(torch.float32).min])
def test_a_prompt_that_is_padding_only(value: float) -> None:
    """One number for every key, however low, hides none of them; nor may it eat up the digits."""
    q, k, mask = queries(), keys(), torch.full((B, 1, 1, M), value)
    close(attention_entropy(q, k, mask=mask), reference(q, k).mean((1, 2)), 1e-5)
    close(attention_entropy(q, k, mask=mask, normalize="keys"), reference(q, k).mean((1, 2)) / math.log(M), 1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 2e-4), (torch.bfloat16, 2e-4)])
def test_half_precision_is_widened(dtype: torch.dtype, rtol: float) -> None:
    """Against the reference of the rounded inputs: nothing is lost after that."""
    q, k = queries(dtype=dtype), keys(dtype=dtype)
    for mask in masks().values():
        result = attention_entropy(q, k, mask=mask)
        assert result.dtype == torch.float32
        close(result, reference(q, k, mask).mean((1, 2)), rtol)


def test_damage_is_seen() -> None:
    q, k = queries(), keys()
    q[0, 1, 3, 2] = math.nan
    for mask in (None, masks()["keys"], masks()["added to keys"]):
        result = attention_entropy(q, k, mask=mask)
        assert result[0].isnan()
        assert result[1].isfinite()
    mask = torch.zeros(B, 1, 1, M)
    mask[0, 0, 0, 3] = math.nan
    assert attention_entropy(queries(), k, mask=mask).isnan().tolist() == [True, False]


def image(side: int) -> tuple[Tensor, Tensor]:
    """Queries of an image whose columns differ: entropy goes from sharp at the left to flat at the right."""
    sharpness = torch.linspace(0.1, 6, side).repeat(side)[:, None]
    return queries(2, 2, side * side, D, spread=1.0) * sharpness, keys(2, 2, side * side, D, spread=1.0)


@pytest.mark.parametrize("rows", [16, 32, 64, 256])
def test_sampled_rows_stay_within_the_stated_error(rows: int) -> None:
    q, k = image(32)
    every_row = reference(q, k)
    error = (attention_entropy(q, k, rows=rows) - every_row.mean((1, 2))).abs()
    standard_error = every_row.mean(1).std(-1) / math.sqrt(rows)  # heads are alike here: their mean, over rows
    assert (error <= 2 * standard_error).all()
    assert error.max() > 1e-6  # not all rows were looked at


def test_sampled_rows_are_those_of_the_mask_too() -> None:
    q, k = image(16)
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    scores = torch.zeros(1, 2, 256, 256).masked_fill(~causal, -math.inf)
    by_flag = attention_entropy(q, k, is_causal=True, rows=64)
    close(attention_entropy(q, k, mask=causal, rows=64), by_flag, 1e-5)
    close(attention_entropy(q, k, mask=scores, rows=64), by_flag, 1e-5)
    exact = reference(q, k, causal)
    close(by_flag, exact.mean((1, 2)), 0.1)
    close(attention_entropy(q, k, is_causal=True, rows=64, normalize="sum"), exact.sum(-1), 0.1)


def test_as_many_rows_as_there_are_is_exact() -> None:
    q, k = queries(), keys()
    for rows in (N, 10 * N):
        assert torch.equal(attention_entropy(q, k, rows=rows), attention_entropy(q, k))


@pytest.mark.parametrize("lead", [(), (3, 4), (3, 2, 4)])
def test_attentions_of_other_dimensions(lead: tuple[int, ...]) -> None:
    """Three dimensions have one head; between samples and heads there may be more (frames)."""
    q, k, mask = queries(B, *lead, N, D), keys(B, *lead, M, D), torch.rand(B, *[1] * len(lead), 1, M) > 0.3
    heads = math.prod(lead)
    expected = reference(q.reshape(B, heads, N, D), k.reshape(B, heads, M, D), mask.reshape(B, 1, 1, M))
    close(entropy_in_graph(q, k, mask), expected.mean((1, 2)), 2e-4)


class Allocations(TorchDispatchMode):
    """Notes each operation and the largest tensor that any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append(func)
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in tensors)])
        return result


@pytest.mark.parametrize("kind", ["none", "causal", "keys", "added to keys", "half"])
def test_nothing_of_queries_times_keys_is_made(kind: str) -> None:
    n, dtype = 512, torch.bfloat16 if kind == "half" else torch.float32
    q, k = queries(1, 2, n, D, dtype=dtype), keys(1, 2, n, D, dtype=dtype)
    mask = {"keys": torch.arange(n) < 400, "added to keys": torch.randn(1, 1, 1, n)}.get(kind)
    with Allocations() as seen:
        entropy_in_graph(q, k, mask, kind == "causal")
    assert seen.ops.count(KERNEL) == 1
    assert seen.largest <= 2 * n * (D + 1)


def test_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 512
    monkeypatch.setattr(row_entropy, "BLOCK_SCORES", 2 * 32 * n)
    monkeypatch.setattr(row_entropy, "_has_kernel", lambda *_: False)
    q, k = queries(1, 2, n, D), keys(1, 2, n, D)
    with Allocations() as seen:
        result = attention_entropy(q, k)
    assert KERNEL not in seen.ops
    assert seen.largest == 2 * 32 * n
    close(result, reference(q, k).mean((1, 2)), 2e-4)


def test_sampling_rows_is_cheap() -> None:
    n, rows = 4096, 64
    q, k = queries(1, 2, n, D), keys(1, 2, n, D)
    with Allocations() as seen:
        attention_entropy(q, k, rows=rows, is_causal=True)
    assert seen.largest <= 2 * n * D + rows * n


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": masks()["keys"]},
    "rows": {"rows": 7, "is_causal": True},
    "added to all": {"attn_mask": masks()["added to all"]},
    "scale, keys": {"scale": 0.3, "normalize": "keys"},
}


@pytest.mark.parametrize("call", CALLS)
def test_it_is_traced_in_one_graph(call: str) -> None:
    torch._dynamo.reset()
    traced = torch.compile(entropy_in_graph, fullgraph=True, backend="aot_eager")
    q, k = queries(), keys(B, 2, M, D)
    with torch.compiler.set_stance("default"):
        close(traced(q, k, enable_gqa=True, **CALLS[call]), attention_entropy_like(q, k, CALLS[call]), 1e-6)


def attention_entropy_like(q: Tensor, k: Tensor, call: dict[str, Any]) -> Tensor:
    return attention_entropy(q, k, **{"mask" if name == "attn_mask" else name: value for name, value in call.items()})


def test_inductor_compiles_it() -> None:
    """As a site has them: queries and keys are views of one projection, transposed."""
    torch._dynamo.reset()
    calls = [CALLS["plain"], {"attn_mask": masks()["keys"][..., :N]}]

    def site(projected: Tensor) -> list[Tensor]:
        q, k = projected.sin().unflatten(-1, (2, H, D)).permute(2, 0, 3, 1, 4)
        return [entropy_in_graph(q, k, **call) for call in calls]

    projected = queries(B, N, 2 * H * D)
    expected = site(projected)
    for compiled, eager in zip(torch.compile(site, fullgraph=True)(projected), expected, strict=True):
        close(compiled, eager, 1e-5)
    assert (expected[0] - expected[1]).abs().min() > 0.1


class EfficientAttention:
    """Stands in for CUDA's kernel, with what it asks for and what it pads, so that the way to it runs without a GPU."""

    def __init__(self) -> None:
        self.calls = 0

    @property
    def _scaled_dot_product_efficient_attention(self) -> Any:
        return SimpleNamespace(default=self)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple[Any, ...]:
        self.calls += 1
        bias, with_lse, dropout, is_causal = rest
        assert (bias, with_lse, dropout) == (None, True, 0.0)
        assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
        scores = scale * (q.float() @ k.float().mT)
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        lse = F.pad(scores.logsumexp(-1), (0, -q.shape[-2] % 32), value=math.nan)
        return (scores.softmax(-1) @ v.float()).to(q.dtype), lse, torch.empty(()), torch.empty(())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-4), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kind", masks())
def test_the_way_to_the_cuda_kernel(
    kind: str, dtype: torch.dtype, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = EfficientAttention()
    monkeypatch.setattr(row_entropy, "aten", kernel)
    monkeypatch.setattr(row_entropy, "_device", lambda q: "cuda")
    mask = masks()[kind]
    for d in (D, 20):
        q, k = queries(B, H, N, d, dtype=dtype), keys(B, H, M, d, dtype=dtype)
        close(attention_entropy(q, k, mask=mask), reference(q, k, mask).mean((1, 2)), rtol)
    differs_by_row = mask is not None and mask.ndim > 1 and mask.shape[-2] != 1
    assert kernel.calls == (0 if differs_by_row else 2)


def test_sizes_may_be_symbolic() -> None:
    torch._dynamo.reset()
    traced = torch.compile(entropy_in_graph, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.compiler.set_stance("default"):
        traced(queries(), keys(), rows=8)
        traced(queries(B, H, 2, D), keys(), rows=8)  # fewer rows than asked for: another graph
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, m in ((40, 20), (64, 64), (200, 10)):
            q, k = queries(B, H, n, D), keys(B, H, m, D)
            close(traced(q, k, rows=8), attention_entropy(q, k, rows=8), 1e-6)


def test_queries_that_train_get_no_graph() -> None:
    q = queries().requires_grad_()
    assert not attention_entropy(q, keys()).requires_grad


X, K = torch.ones(2, 4, 5, 8), torch.ones(2, 4, 6, 8)


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        (X, K, {"normalize": "mean"}, "normalize is 'mean'. Use one of row, keys, sum"),
        (X, K, {"rows": 0}, "rows is 0"),
        (X.int(), K.int(), {}, "one floating point dtype"),
        (X, K.half(), {}, "one floating point dtype"),
        (X, K.to("meta"), {}, "one device"),
        (X[0], K[0], {}, r"pass q \[B, H, N, D\]"),
        (X, K[:1], {}, r"pass q \[B, H, N, D\]"),
        (X, K[..., :4], {}, r"pass q \[B, H, N, D\]"),
        (X, K[:, :3], {}, "heads of k dividing H"),
        (X, K[:, :, :0], {}, "none empty"),
        (X, K, {"mask": torch.ones(2, 1, 1, 5)}, "does not broadcast"),
        (X, K, {"mask": torch.ones(1, 1, 1, 1, 6)}, "does not broadcast"),
        (X, K, {"mask": torch.ones(6, dtype=torch.int64)}, "mask is torch.int64"),
        (X, K, {"mask": torch.ones(6), "is_causal": True}, "exclude each other"),
    ],
)
def test_what_has_no_meaning_is_refused(q: Tensor, k: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        attention_entropy(q, k, **options)


@cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", masks())
def test_cuda_is_the_definition(kind: str, dtype: torch.dtype) -> None:
    rtol = {torch.float16: 1e-3, torch.bfloat16: 5e-3}.get(dtype) or RTOL[dtype]
    for d in (D, 20):
        q, k, mask = queries(B, H, N, d, dtype=dtype), keys(B, H, M, d, dtype=dtype), masks()[kind]
        result = attention_entropy(q.cuda(), k.cuda(), mask=None if mask is None else mask.cuda()).cpu()
        close(result, reference(q, k, mask).mean((1, 2)), rtol)


@cuda
def test_cuda_makes_nothing_of_queries_times_keys() -> None:
    n = 4096
    q, k = (torch.randn(1, 8, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    close(attention_entropy(q, k, is_causal=True), attention_entropy(q.float(), k.float(), is_causal=True), 1e-3)
    assert torch.cuda.max_memory_allocated() - before < n * n  # bytes: a sixteenth of the scores in bfloat16


@cuda
def test_cuda_compiles_to_the_same() -> None:
    torch._dynamo.reset()
    q, k = queries(dtype=torch.bfloat16).cuda(), keys(dtype=torch.bfloat16).cuda()
    for mask in (None, torch.arange(M, device="cuda")[None, None, None] < 50):
        compiled = torch.compile(entropy_in_graph, fullgraph=True)
        close(compiled(q, k, mask), entropy_in_graph(q, k, mask), 1e-4)
