"""What ``explain`` counts where attentions have no operator of their own, or torch made one operator of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqar_fx import CacheConfig, Schedule, explanation
from dqar_fx.explanation import explain

SANA = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8,
    "sample_size": 8, "patch_size": 1,
}  # fmt: skip


def explained(name: str, **config: Any) -> dict[str, Any]:
    return explain(name, Schedule.interval(50), CacheConfig(), config=config, dtype=torch.float32)


def test_linear_attentions_are_sites_and_are_counted() -> None:
    found = explained("SanaTransformer2DModel", **SANA)
    assert [(s["path"].split(".")[-1], s["kind"]) for s in found["sites"]] == [
        ("attn1", "self"),
        ("attn2", "cross"),
    ] * 2
    assert all(s["flop_share"] > 0 for s in found["sites"])
    assert found["attentions"] == found["attentions_captured"] == 4  # two are operators, two are written out
    assert found["advice"] == found["left_computing"] == found["uncounted"] == []


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.layer(hidden_states)
        return x + self.attn(x, x, x)[0]


def test_a_layer_that_is_one_operator_is_left_computing_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation, "find_model", lambda name, config: lambda: Encoder().eval())
    monkeypatch.setattr(explanation, "example_inputs", lambda model: {"hidden_states": torch.randn(1, 6, 16)})
    found = explained("anything")
    assert [s["owner"] for s in found["sites"]] == ["MultiheadAttention"]
    (left,) = found["left_computing"]
    assert (left["path"], "set_fastpath_enabled" in left["reason"]) == ("layer", True)
    assert found["attentions"] == found["attentions_captured"] == 2  # none of them runs outside of the graph


FLUX = {
    "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def test_of_keys_and_values_the_share_and_the_bytes_are_told() -> None:
    schedule = Schedule.always(50)
    settings: dict[str, Any] = {"config": FLUX, "dtype": torch.float32, "sizes": {"text_tokens": 5}}
    whole = explain("FluxTransformer2DModel", schedule, CacheConfig(), **settings)
    found = explain("FluxTransformer2DModel", schedule, CacheConfig("kv"), **settings)
    assert (found["stored"], whole["stored"]) == ("keys and values", "outputs")
    assert len(found["sites"]) == len(whole["sites"]) == 2
    for mine, theirs in zip(found["sites"], whole["sites"], strict=True):
        batch, heads, length, size = map(int, mine["shapes"][0])
        work = 2 * 2 * batch * length * (heads * size) ** 2  # from each token a key and a value
        assert mine["flop_share"] == pytest.approx(work / (found["gflop_per_call"] * 1e9))
        assert mine["cache_bytes"] == 2 * batch * heads * length * (size + 4)
        assert mine["flop_share"] < theirs["flop_share"]
    assert 1 < found["bound"] < whole["bound"]
    assert found["flop_share"] == pytest.approx(sum(site["flop_share"] for site in found["sites"]))


def test_where_one_projection_makes_all_three_it_is_told_that_nothing_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Linear(16, 48)

        def forward(self, hidden_states: Tensor) -> Tensor:
            q, k, v = self.attn(hidden_states).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return hidden_states + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    monkeypatch.setattr(explanation, "find_model", lambda name, config: lambda: Joined().eval())
    monkeypatch.setattr(explanation, "example_inputs", lambda model: {"hidden_states": torch.randn(1, 6, 16)})
    found = explain("anything", Schedule.interval(50), CacheConfig("kv"), dtype=torch.float32)
    assert [site["flop_share"] for site in found["sites"]] == [0.0]
    assert any("of 1 sites back saves nothing" in text for text in found["advice"])
