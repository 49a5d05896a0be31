"""Keys and values in place of outputs: what is stored, what that saves, and what is exact on a fixed prompt.

    python examples/keys_values.py

A small PixArt (random weights, cross-attention on a prompt). With ``target="kv"`` queries stay fresh and only the
projections of keys and values are saved; those of the prompt's tokens are the same at every step, so that they are
read without any error ("lossless"), whatever the schedule.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from diffusers import PixArtTransformer2DModel
from tabulate import tabulate
from torch import Tensor

import dqar_fx
from dqar_fx import CacheConfig, Schedule


def make_model() -> PixArtTransformer2DModel:
    """A PixArt of three blocks, with the operators of the real one."""
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3,
        cross_attention_dim=64, sample_size=16, patch_size=2, caption_channels=32, use_additional_conditions=False,
    ).eval()  # fmt: skip


@torch.no_grad()
def generate(model: torch.nn.Module, steps: int) -> Tensor:
    """A plain loop: the prompt's embedding is the same tensor at every step."""
    generator = torch.Generator().manual_seed(0)
    x, prompt = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 12, 32, generator=generator)
    for step in range(steps):
        timestep = torch.full((1,), 999 - 999 * step // steps)
        arguments = {"timestep": timestep, "encoder_hidden_states": prompt, "added_cond_kwargs": {}}
        x = x - 0.1 * model(x, **arguments).sample
    return x


def main(argv: Sequence[str] | None = None) -> None:
    """Print sites, bytes, reuse and error for both targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--backend", default="inductor", help='"eager" needs no compiler')
    args = parser.parse_args(argv)
    model = make_model()
    reference = generate(model, args.steps)
    rows = []
    for text in ("int8", "kv:int8", "kv:native/int8", "kv:native"):
        schedule = Schedule.interval(args.steps, every=3, warmup=0.1)
        dqar_fx.optimize(model, schedule, cache=CacheConfig.parse(text), backend=args.backend)
        runtime = dqar_fx.runtime(model)
        with runtime.generation(args.steps):
            sample = generate(model, args.steps)
            stored = runtime.stats.cache_bytes
        error = float((sample - reference).norm() / reference.norm())
        exact = sum(site.lossless for site in runtime.sites)
        rows.append([text, len(runtime.sites), exact, f"{runtime.stats.reuse_ratio:.0%}", stored / 1024, error])
        dqar_fx.restore(model)
    headers = ["cache", "sites", "of them exact", "reused", "stored KiB", "relative error"]
    print(tabulate(rows, headers=headers, floatfmt=("", "", "", "", ".1f", ".1e")))


if __name__ == "__main__":
    main()
