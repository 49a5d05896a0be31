"""Graphs to look at: captured by Dynamo, traced by hand, and of small diffusers models."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dqar_fx.graph.effects import target_name
from dqar_fx.graph.sites import Region, Site

WIDTH = 16


@pytest.fixture(autouse=True)
def _fresh(fresh_inference: None) -> None:
    """Every test here captures."""


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The graph of one call, as Dynamo gives it to a backend."""
    return capture_call(model, *args, **kwargs)[0]


def capture_call(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The graph of one call, and the inputs that Dynamo calls it with."""
    calls: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            calls.append((gm, inputs))
            return gm(*inputs)

        return run

    dynamic = kwargs.pop("dynamic", None)
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    (call,) = calls
    return call


def traced(function: Callable[..., Any], *examples: Any) -> fx.GraphModule:
    """A graph built by hand, with the example values that Dynamo would leave (here: real ones, so that views show)."""
    gm = fx.symbolic_trace(function)

    class Annotate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["example_value"] = value = super().run_node(n)
            return value

    Annotate(gm).run(*copy.deepcopy(examples))
    return gm


def region(gm: fx.GraphModule, inside: str, exits: str, path: str = "attn") -> Region:
    """A region of a graph built by hand; names are separated by blanks."""
    names = [n.name for n in gm.graph.nodes if n.name in inside.split()]
    attentions = tuple(n for n in names if n.startswith("scaled_dot_product_attention"))
    site = Site(-1, path, "self", "Attention", tuple(exits.split()), (), None)
    return Region(site, attentions, tuple(exits.split()), frozenset(names))


def ops(gm: fx.GraphModule) -> Counter[str]:
    """How often the graph calls what."""
    return Counter(target_name(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method"))


def equal(a: Any, b: Any) -> bool:
    """Bit-equal, also where both are NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    return len(a) == len(b) and all(map(equal, a, b))


# -- models of our own ----------------------------------------------------------------------------------------------


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join_heads(F.scaled_dot_product_attention(split_heads(q), split_heads(k), split_heads(v)))


class Attention(nn.Module):
    """The usual: Q, K, V in one projection, an out-projection, no residual."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(*self.qkv(x).chunk(3, -1)))


class Block(nn.Module):
    """A DiT block: modulated attention and feed-forward, each with a gate and a residual."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, gate, gate_mlp = self.modulation(c).unsqueeze(1).chunk(3, -1)
        x = x + gate * self.attn(self.norm(x) + shift)
        return x + gate_mlp * self.mlp(self.norm(x))


class Transformer(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks or (Block(), Block(), Block()))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x, c = self.embed(x), timestep.sin() * torch.ones(x.shape[0], WIDTH)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, WIDTH)


# -- small models of diffusers --------------------------------------------------------------------------------------


def dit() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    inputs = {"timestep": torch.tensor([7]), "class_labels": torch.tensor([3])}
    return model.eval(), {"hidden_states": torch.randn(1, 4, 8, 8), **inputs, "return_dict": False}


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"encoder_hidden_states": torch.randn(1, 6, 12), "timestep": torch.tensor([7])}
    added = {"resolution": None, "aspect_ratio": None}
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 8, 8), **inputs, "added_cond_kwargs": added, "return_dict": False,
    }  # fmt: skip


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10, out_channels=4,
    )  # fmt: skip
    inputs = {"encoder_hidden_states": torch.randn(1, 6, 12), "pooled_projections": torch.randn(1, 10)}
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 8, 8), **inputs, "timestep": torch.tensor([7.0]), "return_dict": False,
    }  # fmt: skip


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=False, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = {"encoder_hidden_states": torch.randn(1, 6, 12), "pooled_projections": torch.randn(1, 10)}
    return model.eval(), {
        "hidden_states": torch.randn(1, 16, 4), **inputs, "timestep": torch.tensor([0.7]),
        "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(6, 3), "return_dict": False,
    }  # fmt: skip


def wan() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {"timestep": torch.tensor([7]), "encoder_hidden_states": torch.randn(1, 6, 16)}
    return model.eval(), {"hidden_states": torch.randn(1, 4, 2, 8, 8), **inputs, "return_dict": False}


MODELS = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan}


@functools.cache
def captured_model(name: str) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """One of ``MODELS``, captured once for all tests (no pass may change the graph that it is given)."""
    with torch.no_grad():
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        return capture_call(model, **inputs)
