"""The models that are sampled: random weights from one seed, and a sampler as pipelines have it.

Random weights make speed, memory and plans what they are with trained ones, and errors and what a cache decides by data
not: compare errors at equal plans only. Models that predict the noise would let a random network's sample explode, so
the samplers here take the prediction for a velocity, which keeps it bounded whatever the weights say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

#: Blocks of classes that do not name theirs (``_repeated_blocks``) for ``compile_repeated_blocks``.
REPEATED = {"DiTTransformer2DModel": ["BasicTransformerBlock"], "PixArtTransformer2DModel": ["BasicTransformerBlock"]}
#: How strongly the conditional prediction is followed where both branches go through the model in one call.
GUIDANCE = 4.0
WEIGHTS_SEED, NOISE_SEED = 0, 1

Step = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model at one size.

    Args:
        kind: a diffusers transformer class.
        config: what it is built from.
        latents: shape of one sample.
        text: tokens of a prompt, where there is one.
        images: how many samples are drawn at once; with guidance the model sees each twice, in one call.
        host_bound: kernels take next to no time, so that a step's time is what the host needs.
    """

    kind: str
    config: Mapping[str, Any]
    latents: tuple[int, ...]
    text: int = 0
    images: int = 1
    host_bound: bool = False
    #: The same, small enough for tests.
    small: Mapping[str, Any] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        """Flux has learnt its guidance; the others see every sample with and without their condition."""
        return self.kind != "FluxTransformer2DModel"

    @property
    def rows(self) -> int:
        """Samples in one call of the model."""
        return self.images * (2 if self.guided else 1)

    @property
    def tokens(self) -> int:
        """Image or video tokens of one sample."""
        if self.kind == "FluxTransformer2DModel":
            return self.latents[0]
        patch = self.config.get("patch_size", 2)
        sizes = self.latents[1:]
        per = (patch,) * len(sizes) if isinstance(patch, int) else tuple(patch)
        count = 1
        for size, step in zip(sizes, per, strict=True):
            count *= size // step
        return count

    @property
    def title(self) -> str:
        """Class, blocks, width, and the shape of a call, for people."""
        layers = self.config["num_layers"] + self.config.get("num_single_layers", 0)
        width = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        name = self.kind.removesuffix("Model").removesuffix("2D").removesuffix("3D").removesuffix("Transformer")
        text = f" + {self.text}" if self.text else ""
        return f"{name} {layers} x {width}, {self.rows} x {self.tokens}{text} tokens"


def _dit(layers: int, heads: int, head_dim: int, size: int, images: int = 1, **more: Any) -> Case:
    config = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "sample_size": size,
        "in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    return Case(
        kind="DiTTransformer2DModel", config=config, latents=(4, size, size), images=images, small=small, **more
    )  # fmt: skip


def _pixart(layers: int, heads: int, head_dim: int, size: int, text: int) -> Case:
    config = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "sample_size": size,
        "cross_attention_dim": heads * head_dim, "caption_channels": 128, "use_additional_conditions": False,
    }  # fmt: skip
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
             "cross_attention_dim": 32}  # fmt: skip
    return Case(kind="PixArtTransformer2DModel", config=config, latents=(4, size, size), text=text, small=small)


def _flux(double: int, single: int, heads: int, head_dim: int, tokens: int, text: int) -> Case:
    first = head_dim // 8  # FLUX.1's axes are 16, 56 and 56 of 128
    config = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": double, "num_single_layers": single,
        "in_channels": 64, "joint_attention_dim": 256, "pooled_projection_dim": 64, "guidance_embeds": True,
        "axes_dims_rope": (first, (head_dim - first) // 2, (head_dim - first) // 2),
    }  # fmt: skip
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 2,
             "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    return Case(kind="FluxTransformer2DModel", config=config, latents=(tokens, 64), text=text, small=small)


def _wan(layers: int, heads: int, head_dim: int, latents: tuple[int, ...], text: int) -> Case:
    config = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "text_dim": 256,
        "ffn_dim": heads * head_dim * 35 // 6,  # as in Wan 2.1's 1.3B
        "patch_size": (1, 2, 2),
    }  # fmt: skip
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64}
    return Case(kind="WanTransformer3DModel", config=config, latents=latents, text=text, small=small)


#: For a CPU, and for one GPU; the sizes of the second are those of the published models, with fewer blocks where a
#: comparison of twenty processes would not end in minutes.
CASES: dict[str, Case] = {
    "dit-256": _dit(6, 6, 64, 32),
    "dit-1024": _dit(4, 6, 64, 64),
    "pixart-4096": _pixart(2, 4, 64, 128, 120),
    "flux": _flux(2, 4, 6, 64, 256, 64),
    "wan": _wan(4, 4, 64, (16, 5, 16, 16), 64),
    "host": _dit(28, 1, 16, 4, host_bound=True),
    "dit-xl-256": _dit(28, 16, 72, 32),
    "dit-xl-256-b8": _dit(28, 16, 72, 32, 8),
    "dit-xl-512": _dit(28, 16, 72, 64),
    "dit-xl-512-b8": _dit(28, 16, 72, 64, 8),
    "flux-1024": _flux(4, 8, 24, 128, 4096, 512),
    "wan-480p": _wan(4, 12, 128, (16, 21, 60, 104), 512),
}


def find(name: str, *, small: bool = False, blocks: int | None = None) -> Case:
    """A case by name; ``small`` shrinks it for tests, ``blocks`` gives it another number of blocks."""
    case = CASES[name]
    config = dict(case.config)
    latents, text = case.latents, case.text
    if small:
        config.update(case.small)
        text = min(text, 8)
        match case.kind:
            case "FluxTransformer2DModel":
                latents = (16, 64)
            case "WanTransformer3DModel":
                latents = (16, 2, 8, 8)
            case _:
                latents = (latents[0], 8, 8)
    if blocks is not None:
        config["num_layers"] = blocks
        if "num_single_layers" in config:
            config["num_single_layers"] = 2 * blocks
    return Case(
        kind=case.kind, config=config, latents=latents, text=text, images=case.images, host_bound=case.host_bound,
        small=case.small,
    )  # fmt: skip


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in ``dtype``, but for the parts that its class keeps in float32, as ``from_pretrained`` loads it."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None or not value.is_floating_point() or kept.intersection([*path.split("."), name]):
                    continue
                if isinstance(value, nn.Parameter):
                    value.data = value.data.to(dtype)
                else:  # it may be a view of what has the old dtype, which Dynamo would stumble over
                    table[name] = value.to(dtype)
    return model


def _nothing(_step: int) -> None:
    pass


class Sampler:
    """One model, its scheduler and its inputs; ``draw`` is a generation.

    Attributes:
        model: in eval mode, without gradients, on ``device`` in ``dtype``.
        scheduler: DDIM, or flow matching for Flux and Wan.
        block_classes: class names of the repeated blocks.
    """

    def __init__(self, case: Case, steps: int, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.steps, self.device, self.dtype = case, steps, device, dtype
        torch.manual_seed(WEIGHTS_SEED)
        with torch.device(device):  # drawing a large model's weights on the host would take longer than all else
            model = getattr(diffusers, case.kind)(**case.config)
        self.model: nn.Module = cast(model, dtype).to(device).eval().requires_grad_(False)
        self.block_classes = REPEATED.get(case.kind) or list(model._repeated_blocks)
        if case.kind in ("FluxTransformer2DModel", "WanTransformer3DModel"):
            self.scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            self.scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
        generator = torch.Generator().manual_seed(NOISE_SEED)
        self._noise = torch.randn(case.images, *case.latents, generator=generator)
        self._conditions = {name: value.to(device) for name, value in self._conditions_of(generator).items()}

    def _conditions_of(self, generator: torch.Generator) -> dict[str, Tensor]:
        """What a call is conditioned on; where guided, the unconditional half comes first, as in pipelines."""
        case, rows = self.case, self.case.rows

        def normal(*shape: int) -> Tensor:
            return torch.randn(rows, *shape, generator=generator).to(self.dtype)

        match case.kind:
            case "DiTTransformer2DModel":
                labels = torch.arange(case.images) * 97 % 1000
                return {"class_labels": torch.cat([torch.full_like(labels, 1000), labels])}
            case "PixArtTransformer2DModel":
                return {"encoder_hidden_states": normal(case.text, case.config["caption_channels"])}
            case "WanTransformer3DModel":
                return {"encoder_hidden_states": normal(case.text, case.config["text_dim"])}
            case "FluxTransformer2DModel":
                side = int(case.latents[0] ** 0.5)
                places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
                return {
                    "encoder_hidden_states": normal(case.text, case.config["joint_attention_dim"]),
                    "pooled_projections": normal(case.config["pooled_projection_dim"]),
                    "guidance": torch.full((rows,), GUIDANCE, dtype=self.dtype),
                    "txt_ids": torch.zeros(case.text, 3, dtype=self.dtype),
                    "img_ids": nn.functional.pad(places.reshape(-1, 2), (1, 0)).to(self.dtype),
                }
        raise AssertionError(case.kind)

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, in the order in which they are called."""
        return [m for m in self.model.modules() if type(m).__name__ in self.block_classes]

    @torch.no_grad()
    def draw(self, call: Callable[..., Any], before: Step = _nothing, after: Step = _nothing) -> Tensor:
        """One generation, from the same noise every time: float32 ``[images, *latents]``.

        Args:
            call: the model, or a stand-in for it; it is given keyword arguments only.
            before: called with the step's index ahead of each step.
            after: called with it behind each.
        """
        case, scheduler = self.case, self.scheduler
        scheduler.set_timesteps(self.steps, device=self.device)
        flow = case.kind == "FluxTransformer2DModel"
        # The scheduler indexes with timesteps of the host: reading one back from a GPU would wait for it.
        timesteps = scheduler.timesteps.cpu()
        # As in the pipelines: a view of the scheduler's, but for Flux.
        told = [((t / 1000).to(self.dtype) if flow else t).expand(case.rows) for t in scheduler.timesteps]
        latents = (self._noise * getattr(scheduler, "init_noise_sigma", 1.0)).to(self.device)
        for step, timestep in enumerate(timesteps):
            before(step)
            x = latents.to(self.dtype)
            x = torch.cat([x, x]) if case.guided else x
            velocity = call(hidden_states=x, timestep=told[step], return_dict=False, **self._conditions)[0]
            velocity = velocity[:, : case.latents[0]].float() if case.guided else velocity.float()
            if case.guided:
                unconditional, conditional = velocity.chunk(2)
                velocity = unconditional + GUIDANCE * (conditional - unconditional)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            after(step)
        return latents
