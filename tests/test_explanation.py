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
