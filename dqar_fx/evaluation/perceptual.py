"""LPIPS and the CLIP score, where the packages and the weights of their networks can be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dqar_fx.errors import MetricError
from dqar_fx.evaluation.features import BATCH, in_colour, made

#: AlexNet's third pooling has nothing left of smaller images.
LPIPS_SMALLEST = 64
CLIP = "openai/clip-vit-base-patch16"


def lpips(device: torch.device, size: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with AlexNet (Zhang et al. 2018, arXiv:1801.03924), by torchmetrics.

    Args:
        device: where the network runs.
        size: height and width of the images.

    Returns:
        A function of images and references, ``[N, C, H, W]`` in [0, 1], that returns float64 ``[N]`` on the CPU.

    Raises:
        MetricError: the images are too small for it, or the package or its weights are not there.
    """
    if min(size) < LPIPS_SMALLEST:
        raise MetricError(
            f"LPIPS cannot be measured: its network wants at least {LPIPS_SMALLEST} x {LPIPS_SMALLEST} pixels, "
            f"and the images have {size[0]} x {size[1]}."
        )

    def make() -> Any:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    metric = made("LPIPS", make).to(device)

    @torch.no_grad()
    def measure(images: Tensor, references: Tensor) -> Tensor:
        pairs = zip(images, references, strict=True)  # one at a time: the metric returns the mean of a batch
        found = [
            float(metric(*(in_colour(each[None].float().clamp(0, 1)).to(device) for each in pair))) for pair in pairs
        ]
        return torch.tensor(found, dtype=torch.float64)

    return measure


def clip_score(device: torch.device, model: str = CLIP) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """100 times the cosine between CLIP's embeddings of image and prompt, at least 0 (Hessel et al. 2021).

    (arXiv:2104.08718, eq. 1 with w = 100, as torchmetrics has it; by transformers.)

    Args:
        device: where the network runs.
        model: a CLIP model of the Hugging Face hub, or a folder with one.

    Returns:
        A function of images ``[N, C, H, W]`` in [0, 1] and N prompts that returns float64 ``[N]`` on the CPU.

    Raises:
        MetricError: the package or the weights are not there.
    """

    def make() -> Any:
        from transformers import CLIPModel, CLIPProcessor

        network: Any = CLIPModel.from_pretrained(model)
        return network.eval(), CLIPProcessor.from_pretrained(model)

    network, processor = made("the CLIP score", make)
    network.to(device)

    @torch.no_grad()
    def measure(images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(images), BATCH):
            part = in_colour(images[start : start + BATCH].float().clamp(0, 1))
            pixels = [(each * 255).round().to(torch.uint8) for each in part]
            inputs = processor(
                text=list(prompts[start : start + BATCH]), images=pixels, return_tensors="pt", padding=True,
                truncation=True,
            )  # fmt: skip
            result = network(**inputs.to(device))
            image, text = (e / e.norm(dim=-1, keepdim=True) for e in (result.image_embeds, result.text_embeds))
            found.append(100 * (image * text).sum(-1).clamp(min=0).double().cpu())
        return torch.cat(found)

    return measure
