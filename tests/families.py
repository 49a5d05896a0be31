"""Small diffusers models of four families, one way to sample from all of them, and what a run must have counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Schedule

NUM_STEPS = 5
NATIVE = CacheConfig(dtype="native")
#: Steps 0 and 1 compute, 2 and 3 reuse, 4 computes.
SCHEDULE = Schedule.interval(NUM_STEPS, every=3, warmup=2)
NOTHING = Schedule.none(NUM_STEPS)


@dataclass(frozen=True, slots=True)
class Family:
    """A class of diffusers with a small configuration, and what one call of it takes.

    ``inputs(batch, size, prompt)`` are all arguments but the latent and the timestep; ``latent(batch, size)`` is the
    shape of what it denoises; ``sites`` is how many attentions it has.
    """

    kind: type[ModelMixin]
    config: dict[str, Any]
    latent: Callable[[int, int], tuple[int, ...]]
    inputs: Callable[[int, int, int], dict[str, Tensor]]
    sites: int
    integer_timestep: bool = True

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model = self.kind(**self.config).eval()
        return model if dtype is torch.float32 else model.to(dtype)

    def optimized(
        self, schedule: Schedule = SCHEDULE, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
    ) -> Any:
        settings = {"backend": "eager", "cache": NATIVE, **settings}
        return dqar_fx.optimize(self.make(dtype, seed), schedule, **settings)

    def timestep(self, step: int, batch: int) -> Tensor:
        value = 900 - 100 * step
        return torch.full((batch,), value) if self.integer_timestep else torch.full((batch,), value / 1000)

    def noise(self, *, seed: int = 0, batch: int = 2, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
        """The latent that ``sample`` starts from."""
        return torch.randn(*self.latent(batch, size), generator=torch.Generator().manual_seed(seed)).to(dtype)

    def conditioning(
        self, *, prompt: int = 0, batch: int = 2, size: int = 8, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """All arguments of a call but the latent and the timestep, in memory of their own."""
        return {
            name: value.to(dtype) if value.is_floating_point() and not name.endswith("_ids") else value
            for name, value in self.inputs(batch, size, prompt).items()
        }

    def call(
        self, model: nn.Module, step: int, x: Tensor | None = None, *, given: Mapping[str, Tensor] | None = None,
        seed: int = 0, prompt: int = 0, batch: int = 2, size: int = 8, dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """The prediction of one step for latent ``x`` (by default ``noise``), conditioned on ``given``."""
        x = self.noise(seed=seed, batch=batch, size=size, dtype=dtype) if x is None else x
        given = self.conditioning(prompt=prompt, batch=batch, size=size, dtype=dtype) if given is None else given
        time = self.timestep(step, len(x))
        time = time.to(dtype) if time.is_floating_point() else time
        with torch.no_grad():
            prediction: Tensor = model(hidden_states=x, timestep=time, **given).sample
        return prediction

    def loop(
        self, model: nn.Module, *, steps: Sequence[int] = range(NUM_STEPS), start: Tensor | None = None, seed: int = 0,
        **settings: Any,
    ) -> Iterator[Tensor]:  # fmt: skip
        """One generation that stops after each step; as in a pipeline, its conditioning is made once."""
        given = self.conditioning(**settings)
        settings.pop("prompt", None)
        x = self.noise(seed=seed, **settings) if start is None else start
        for step in steps:
            prediction = self.call(model, step, x, given=given, dtype=settings.get("dtype", torch.float32))
            x = x - 0.2 * prediction.to(x.dtype)
            yield prediction

    def sample(
        self, model: nn.Module, *, between: Callable[[int], object] = lambda step: None, **settings: Any
    ) -> Tensor:
        """One generation: the prediction of every step. ``between(step)`` is called before each step."""
        predictions = []
        loop = self.loop(model, **settings)
        for step in settings.get("steps", range(NUM_STEPS)):
            between(step)
            predictions.append(next(loop))
        return torch.stack(predictions)


def embedded(prompt: int, *shape: int) -> Tensor:
    """The embedding of a prompt, by its number."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7 + prompt))


DIT = Family(
    DiTTransformer2DModel,
    {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
    },
    lambda batch, size: (batch, 4, size, size),
    lambda batch, size, prompt: {"class_labels": (torch.arange(batch) + prompt) % 10},
    sites=2,
)  # fmt: skip

SD3 = Family(
    SD3Transformer2DModel,
    {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
        "pooled_projection_dim": 8, "pos_embed_max_size": 8,
    },
    lambda batch, size: (batch, 4, size, size),
    lambda batch, size, prompt: {
        "encoder_hidden_states": embedded(prompt, batch, 5, 16), "pooled_projections": embedded(prompt, batch, 8),
    },
    sites=2,
)  # fmt: skip

FLUX = Family(
    FluxTransformer2DModel,
    {
        "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8),
    },
    lambda batch, size: (batch, size * size // 4, 8),
    lambda batch, size, prompt: {
        "encoder_hidden_states": embedded(prompt, batch, 5, 16), "pooled_projections": embedded(prompt, batch, 8),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(size / 2), torch.arange(size / 2)),
        "txt_ids": torch.zeros(5, 3),
    },
    sites=2, integer_timestep=False,
)  # fmt: skip

WAN = Family(
    WanTransformer3DModel,
    {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    },
    lambda batch, size: (batch, 4, 2, size, size),
    lambda batch, size, prompt: {"encoder_hidden_states": embedded(prompt, batch, 5, 16)},
    sites=4,
)  # fmt: skip

FAMILIES = {"DiT": DIT, "SD3": SD3, "Flux": FLUX, "Wan": WAN}


@contextlib.contextmanager
def replaying(model: nn.Module, reuse: Sequence[bool], *, quantized: bool = False) -> Iterator[None]:
    """The oracle: where ``reuse[call]``, all attention modules of an eager model return what they last computed."""
    stored: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
    calls = [-1]

    def replayed(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: object, **kwargs: object) -> Any:
            if reuse[calls[0]]:
                values = [dqar_fx.dequantize(*parts) if quantized else parts[0] for parts in stored[module]]
                return values[0] if len(values) == 1 else tuple(values)
            output = original(*args, **kwargs)
            outputs = output if isinstance(output, tuple) else (output,)
            stored[module] = [dqar_fx.quantize(o) if quantized else (o.clone(),) for o in outputs]
            return output

        return forward

    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    counting = model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for module in attentions:
        module.forward = replayed(module, module.forward)
    try:
        yield
    finally:
        counting.remove()
        for module in attentions:
            del module.forward


def assert_planned(model: nn.Module, sites: int, schedule: Schedule = SCHEDULE) -> None:
    """The last generation did what the plan says, at every step and site."""
    plan = schedule.plan(sites)
    decisions = dqar_fx.runtime(model).stats.decisions
    assert [d.action == "reuse" for d in decisions] == plan.reuse.flatten().tolist()


def computed(model: nn.Module, step: int) -> bool:
    """True if every site computed at this step of the last generation; False if every one reused."""
    actions = {d.action for d in dqar_fx.runtime(model).stats.decisions if d.step == step}
    assert len(actions) == 1
    return actions == {"compute"}
