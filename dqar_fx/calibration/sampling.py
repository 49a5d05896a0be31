"""What ``calibrate`` is given to sample with: a function, or a pipeline and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqar_fx.errors import CalibrationError

Sampler = Callable[[nn.Module, int], Tensor]
#: Names under which a pipeline holds its denoiser.
_DENOISERS = ("transformer", "unet", "prior")


class _DecodedError(Exception):
    """Raised in place of decoding: the latents are there."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("latents")
        self.latents = latents


def sampler_of(
    model: Any, sample: Sampler | Mapping[str, Any] | None, scheduler: Any, num_steps: int
) -> tuple[nn.Module, Sampler, Any]:
    """The module, how to sample with it, and its scheduler.

    Raises:
        CalibrationError: it is neither a module with a function nor a pipeline with arguments.
    """
    if isinstance(model, nn.Module):
        if not callable(sample):
            raise CalibrationError(
                f"sample is a {type(sample).__name__}. Beside a module, give sample(model, seed) -> Tensor, which runs "
                f"one generation; or give the pipeline in place of the module."
            )
        return model, sample, scheduler
    denoiser = next((getattr(model, n) for n in _DENOISERS if isinstance(getattr(model, n, None), nn.Module)), None)
    if denoiser is None:
        raise CalibrationError(
            f"model is a {type(model).__name__}, neither an nn.Module nor a pipeline with one of {_DENOISERS}."
        )
    found = getattr(model, "scheduler", None) if scheduler is None else scheduler
    if callable(sample):
        return denoiser, sample, found
    if sample is not None and not isinstance(sample, Mapping):
        raise CalibrationError(
            f"sample is a {type(sample).__name__}. Beside a pipeline, give the arguments of its call as a dict, as in "
            f"{{'prompt': 'a red panda', 'guidance_scale': 4.5}}, or sample(model, seed) -> Tensor."
        )
    return denoiser, _of_pipeline(model, {"num_inference_steps": num_steps, **(sample or {})}), found


def _of_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> Sampler:
    """Runs the pipeline and returns its latents, those of all frames of a video: nothing is decoded."""

    def sample(_model: nn.Module, seed: int) -> Tensor:
        def stop(latents: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            raise _DecodedError(latents)

        vae = getattr(pipe, "vae", None)
        given = dict(arguments)
        if vae is not None:
            vae.decode = stop  # not all pipelines can be asked for their latents
        else:
            given.setdefault("output_type", "latent")
        try:
            result = pipe(**given, generator=torch.Generator().manual_seed(seed))
        except _DecodedError as found:
            return found.latents
        finally:
            if vae is not None:
                del vae.decode
        images = result[0] if isinstance(result, tuple) else next(iter(result.values()))
        if not isinstance(images, Tensor):
            raise CalibrationError(
                f"the pipeline returned {type(images).__name__} without decoding latents. Give "
                f"sample(model, seed) -> Tensor in place of its arguments."
            )
        return images

    return sample
