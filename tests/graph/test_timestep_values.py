"""What is computed for all steps at once: what the timestep reaches and no latent does, where it pays."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dqar_fx import CacheConfig
from dqar_fx.graph.ahead import timestep_values
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.timestep_values import SMALL, USUAL, TimestepValues, take_out
from dqar_fx.runtime.lossless import constant_inputs, timestep_source
from dqar_fx.runtime.program import CapturedGraph
from tests.graph.conftest import WIDTH, Attention, attend, capture_call, captured_model, ops, tokens

CONSTANT = partial(constant_inputs, latents="hidden_states")
STEPS = 10


class Modulated(nn.Module):
    """A block whose attention is scaled by what a label and a timestep give."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.attention = Attention()

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        scale, shift = self.modulation(hidden_states, timestep[:, None].float(), class_labels).chunk(2, -1)
        return hidden_states + self.attention(hidden_states) * scale[:, None] + shift[:, None]

    def modulation(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        del x
        return self.outer(F.silu(self.inner(t) + labels))


class OfLatents(Modulated):
    """A latent reaches the modulation."""

    def modulation(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(t) + labels + x.mean(1)))


class ThroughMemory(Modulated):
    """... by being written into it."""

    def modulation(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        inner = self.inner(t) + labels
        inner.mul_(x.mean())
        return self.outer(F.silu(inner))


class Noisy(Modulated):
    def modulation(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(t) + torch.randn_like(labels)))


class Refined(Modulated):
    """Tokens of a prompt attend to each other anew at every step."""

    def modulation(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        prompt = labels[:, None].expand(-1, 5, -1) * self.inner(t)[:, None]
        return self.outer(attend(prompt, prompt, prompt).mean(1))


class WithoutProduct(Modulated):
    """No matrix is multiplied by: nothing would be saved."""

    def modulation(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([labels * t, labels + t.sin()], -1)


class OfLabels(Modulated):
    """The timestep has no part in it: that is computed once, not for every step."""

    def modulation(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.outer(labels) * (1 + 0.01 * t)


class WrittenInto(Modulated):
    """Its own result is written into later."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        scale = self.modulation(hidden_states, timestep[:, None].float(), class_labels)
        scale += hidden_states.mean()
        return hidden_states + self.attention(hidden_states) * scale[:, None, :WIDTH]


class Wide(Modulated):
    def __init__(self, width: int, inner: int = WIDTH) -> None:
        super().__init__()
        self.outer = nn.Linear(WIDTH, width)
        if inner != WIDTH:
            self.outer = nn.Sequential(nn.Linear(WIDTH, inner), nn.Linear(inner, width))

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        scale = self.modulation(hidden_states, timestep[:, None].float(), class_labels)
        return hidden_states + self.attention(hidden_states) * scale[:, None, :WIDTH]


class HandedOut(Modulated):
    """... or given to the caller."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        scale = self.modulation(hidden_states, timestep[:, None].float(), class_labels)
        return hidden_states + self.attention(hidden_states) * scale[:, None, :WIDTH], scale


def captured(model: nn.Module, batch: int = 2) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The graph of one call, and what it is given, by the names of its inputs."""
    inputs = (tokens(batch), torch.full((batch,), 7), torch.randn(batch, WIDTH))
    gm, given = capture_call(model.eval(), *inputs)
    return gm, dict(zip((n.name for n in gm.graph.nodes if n.op == "placeholder"), given, strict=True))


def taken(gm: fx.GraphModule, num_steps: int = STEPS) -> TimestepValues | None:
    regions = [r for r in find_stored(gm, "output") if not r.site.reason]
    lifted = CapturedGraph(gm, regions, CacheConfig(), Lowerer(lambda gm, _: gm), {}).lifted
    return timestep_values(lifted, regions, CONSTANT, timestep_source, num_steps)


def test_a_modulation_is_taken_out() -> None:
    model = Modulated()
    gm, given = captured(model)
    before = ops(gm)
    found = taken(gm)
    assert found is not None
    assert ops(gm) == before  # left as it was
    assert ops(found.table) == {"getitem": 1, "float": 1, "linear": 2, "add": 1, "silu": 1}
    assert before["linear"] - ops(found.gm)["linear"] == 2
    (row,) = found.table(*(given[name] for name in found.inputs))
    labels, timestep = (next(v for n, v in given.items() if part in n) for part in ("class_labels", "timestep"))
    assert torch.equal(row, model.modulation(row, timestep[:, None].float(), labels))
    assert torch.equal(given[found.timestep], timestep)
    assert found.step_bytes == row.numel() * 4
    assert found.weight_bytes == sum(w.numel() * 4 for layer in (model.inner, model.outer) for w in layer.parameters())
    # The rest, given the row, computes what the whole does.
    (name,) = found.names
    rest = found.gm(*(row if n.name == name else given[n.name] for n in found.gm.graph.nodes if n.op == "placeholder"))
    assert torch.equal(rest[0], gm(*given.values())[0])


@pytest.mark.parametrize("kind", [OfLatents, ThroughMemory, Noisy, Refined, WithoutProduct, WrittenInto, HandedOut])
def test_what_is_not_settled_by_the_timestep_or_does_not_pay_stays(kind: type[Modulated]) -> None:
    gm, _ = captured(kind())
    found = taken(gm)
    linears = [] if found is None else [n for n in found.table.graph.nodes if "outer" in str(n.args)]
    assert not linears


def test_what_no_timestep_reaches_is_computed_once_instead() -> None:
    gm, _ = captured(OfLabels())
    assert taken(gm) is None


@pytest.mark.parametrize(("width", "inner"), [(2 * WIDTH, WIDTH), (512, 160)])
def test_all_steps_take_no_more_memory_than_the_weights(width: int, inner: int) -> None:
    model = Wide(width, inner)
    gm, _ = captured(model)
    weights = sum(w.numel() * 4 for layer in (model.inner, model.outer) for w in layer.parameters())
    assert (weights > SMALL) == (width == 512)  # or what is always granted
    most = max(weights, SMALL) // (2 * width * 4)
    assert most > USUAL
    found = taken(gm, most)
    assert found is not None
    assert found.max_steps == most
    assert found.step_bytes == 2 * width * 4
    fewer = taken(gm, most + 1)
    assert fewer is not None
    assert fewer.step_bytes == 2 * inner * 4  # what it is made of


def test_a_run_of_a_few_steps_decides_for_longer_ones() -> None:
    most = SMALL // USUAL // (2 * 4) // 4 * 4  # elements that a sample can have, of two
    for width, kept in ((most, most), (most + 4, WIDTH)):
        found = taken(captured(Wide(width))[0], num_steps=2)
        assert found is not None
        assert found.step_bytes == 2 * kept * 4


def test_a_value_that_would_not_be_aligned_stays() -> None:
    for width, taken_bytes in ((WIDTH + 1, WIDTH * 4), (WIDTH + 4, (WIDTH + 4) * 4)):
        found = taken(captured(Wide(width), batch=1)[0])
        assert found is not None
        assert found.step_bytes == taken_bytes  # what it is made of; itself


def test_without_a_timestep_nothing_is_taken() -> None:
    gm, _ = captured(Modulated())
    assert timestep_source(["L['hidden_states']", "L['class_labels']"]) == ""
    assert timestep_source(["L['hidden_states']", "L['kwargs']['timestep']"]) == "L['kwargs']['timestep']"
    assert timestep_source(["L['timestep'][0]['noise']"]) == ""
    assert take_out(gm, CONSTANT, "L['sigma']", {}, STEPS) is None


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan"])
def test_models_of_diffusers(name: str) -> None:
    gm, arguments = captured_model(name)
    found = taken(gm)
    assert found is not None
    assert ops(gm)["linear"] - ops(found.gm)["linear"] >= len(found.names) >= 2
    assert found.weight_share > 0.02
    given = dict(zip((n.name for n in gm.graph.nodes if n.op == "placeholder"), arguments, strict=True))
    row = dict(zip(found.names, found.table(*(given[name] for name in found.inputs)), strict=True))
    inputs = (n.name for n in found.gm.graph.nodes if n.op == "placeholder")
    rest = found.gm(*(row[name] if name in row else given[name] for name in inputs))
    assert torch.equal(rest[0], gm(*arguments)[0])
    assert not any("hidden_states" in name and "encoder" not in name for name in found.inputs)
