"""Awkward models, reused, against the same model run eagerly with what its attentions returned stored and replayed.

Each model calls ``self.tap`` on what leaves an attention: it hands the value on; in the oracle it stores or replays it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from tests.graph.conftest import WIDTH, Attention, attend, equal, join_heads, split_heads, tokens

STEPS = 6


class Tapped(nn.Module):
    """One attention, or several, without a tap of its own."""

    tap: Callable[[Any], Any] = staticmethod(lambda value: value)

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Oracle:
    """Stores copies of what passes, in order of the calls; replays copies of them."""

    def __init__(self) -> None:
        self.stored: list[Any] = []
        self.replaying = False
        self.position = 0

    def begin(self, replaying: bool) -> None:
        self.replaying, self.position = replaying, 0
        if not replaying:
            self.stored = []

    def __call__(self, value: Any) -> Any:
        if not self.replaying:
            self.stored.append(copy.deepcopy(value))
            return value
        self.position += 1
        return copy.deepcopy(self.stored[self.position - 1])


class InPlaceBias(Attention):
    """Writes into its result after the node that hands it out."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        out.view(-1).add_(1.0)
        out[:, 0] *= 2
        return out


class FillsBuffer(Attention):
    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        result[:, 1:] = super().forward(x)[:, 1:]
        return result


class Nested(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.refine = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.refine(super().forward(self.refine(x)))


class Joint(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image, text = super().forward(x).split([3, 2], 1)
        return image, text


class Transposed(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class OneResidual(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.tap(self.attn(x)) * timestep


class CalledTwice(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.tap(self.attn(x))
        return x + self.tap(self.attn(x * timestep))


class SharedByTwo(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()}) for _ in range(3)])
        self.blocks[1]["attn"] = self.blocks[0]["attn"]

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.tap(block["attn"](x)) * timestep
        return x


class ExitIsTheOutput(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        a = self.tap(self.first(x))
        b = self.tap(self.second(a))
        return a.view(2, -1), b, a.add_(timestep)


class OneFeedsTheOther(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        a = self.tap(self.first(x * timestep))
        return self.tap(self.second(a)) + a


class DiscardsOne(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        a = self.tap(self.first(x))
        self.second(x)
        return a * timestep


class InPlaceStream(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x.clone()
        for module in self.children():
            x += self.tap(module(x)) * timestep
        return x


class ExitBecomesTheStream(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for module in self.children():
            a = self.tap(module(x))
            a.transpose(0, 1).mul_(timestep)  # through a view, and nobody uses what it returns
            a[:, 1:] += x[:, 1:]
            x = a
        return x


class WritesItsInput(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x.add_(self.tap(self.attn(x)))
        return x * timestep


class TwoStreams(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        image, text = self.tap(self.attn(x))
        return torch.cat([text, image * timestep], 1)


class ReadsTransposed(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.tap(self.attn(x)).transpose(1, 2).view(10, WIDTH) * timestep  # needs the strides of the fresh value


class NoModule(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        stream = torch.empty(2, 5, WIDTH)
        stream.copy_(x)
        gate = timestep.sin()
        return stream + gate * self.tap(self.out(attend(*self.qkv(x).chunk(3, -1))))


class WrittenOut(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class LinearAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).relu().chunk(3, -1)
        return self.out(q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1).unsqueeze(-1) + 1))


class Flex(Attention):
    def forward(self, x: Tensor) -> Tensor:
        mask = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, x.shape[1], x.shape[1], device="cpu")
        q, k, v = map(split_heads, self.qkv(x).chunk(3, -1))
        return self.out(join_heads(flex_attention(q, k, v, block_mask=mask)))


class MultiHead(Tapped):
    """``nn.MultiheadAttention`` in a loop, with samples in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        out, _ = self.attn(y, y, y, need_weights=False)
        return x + self.tap(out).transpose(0, 1) * timestep


class WrittenOutInTheBlock(Tapped):
    """Calls itself an attention and adds the residual itself, around one that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = self.Inner()

    class Inner(WrittenOut):
        tap: Callable[[Any], Any] = staticmethod(lambda value: value)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.tap(super().forward(x))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.attn.tap = self.tap
        return self.attn(x) * timestep


class AutocastInside(Tapped):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for module in self.children():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                a = module(x)
            x = x + self.tap(a).float() * timestep
        return x


MODELS = {
    "a write after the value was taken": (lambda: OneResidual(attn=InPlaceBias()), 1),
    "a result in a buffer": (lambda: OneResidual(attn=FillsBuffer()), 1),
    "an attention in an attention": (lambda: OneResidual(attn=Nested()), 1),
    "a module called twice": (lambda: CalledTwice(attn=Attention()), 2),
    "a module shared by two blocks": (SharedByTwo, 3),
    "an exit that is the model's output": (lambda: ExitIsTheOutput(first=Attention(), second=Attention()), 2),
    "a site that feeds another": (lambda: OneFeedsTheOther(first=Attention(), second=Attention()), 2),
    "a discarded attention": (lambda: DiscardsOne(first=Attention(), second=Attention()), 1),
    "an in-place residual stream": (lambda: InPlaceStream(a=Attention(), b=InPlaceBias()), 2),
    "an exit that becomes the stream": (lambda: ExitBecomesTheStream(a=Attention(), b=Attention()), 2),
    "an input that is written into": (lambda: WritesItsInput(attn=Attention()), 1),
    "two exits": (lambda: TwoStreams(attn=Joint()), 1),
    "a transposed exit": (lambda: ReadsTransposed(attn=Transposed()), 1),
    "no module": (NoModule, 1),
    "written out": (lambda: InPlaceStream(attn=LinearAttention(), b_attn=WrittenOut()), 2),
    "written out in a block": (WrittenOutInTheBlock, 1),
    "flex attention": (lambda: InPlaceStream(a=Flex(), b=Flex()), 2),
    "nn.MultiheadAttention": (MultiHead, 1),
    "autocast": (lambda: AutocastInside(a=Attention(), b=Attention()), 2),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # the oracle does, on purpose
@pytest.mark.parametrize("name", MODELS)
def test_reuse_is_what_replaying_the_attention_would_give(name: str) -> None:
    make, num_sites = MODELS[name]
    model = make().eval()
    oracle, eager = Oracle(), copy.deepcopy(model)
    eager.tap = oracle
    dqar_fx.optimize(
        model, Schedule.interval(STEPS, every=3, warmup=1), cache=CacheConfig(dtype="native"), backend="eager"
    )
    plan = Schedule.interval(STEPS, every=3, warmup=1).plan(num_sites)
    kept = []
    for step in range(STEPS):
        x, timestep = tokens(), torch.tensor(float(STEPS - step))
        mine, theirs = x.clone(), x.clone()
        result = model(mine, timestep)
        oracle.begin(replaying=bool(plan.reuse[step].all()))
        expected = eager(theirs, timestep)
        assert equal(result, expected), f"step {step}"
        assert equal(mine, theirs)
        kept.append((result, copy.deepcopy(expected)))
    assert all(equal(result, expected) for result, expected in kept)  # nothing handed out was written into later
    stats = dqar_fx.runtime(model).stats
    assert stats.reused == int(plan.reuse.sum()) == num_sites * 4
    dqar_fx.restore(model)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((name, "token") for name in MODELS),
        ("a module called twice", "tensor"),
        ("a transposed exit", "channel"),
        ("two exits", "head"),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # the oracle does, on purpose
def test_int8_reuse_runs_and_stays_close(name: str, granularity: str) -> None:
    make, num_sites = MODELS[name]
    model = make().eval()
    oracle, eager = Oracle(), copy.deepcopy(model)
    eager.tap = oracle
    cache = CacheConfig(granularity=granularity)
    dqar_fx.optimize(model, Schedule.interval(2, every=2, warmup=1), cache=cache, backend="eager")
    oracle.begin(replaying=False)
    x, timestep = tokens(), torch.tensor(2.0)
    assert equal(model(x.clone(), timestep), eager(x.clone(), timestep))  # a compute step never sees the cache
    oracle.begin(replaying=True)
    x, timestep = tokens(), torch.tensor(1.0)
    results, expected = model(x.clone(), timestep), eager(x.clone(), timestep)
    for mine, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, expected)), strict=True):
        assert 0 < (mine - theirs).norm() <= 0.03 * theirs.norm()
    assert dqar_fx.runtime(model).stats.reused == num_sites
    dqar_fx.restore(model)
