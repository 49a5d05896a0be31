"""Run a package that ``dqar_fx.export`` wrote of a class-conditional DiT: with torch alone, without dqar_fx.

python examples/run_exported.py dit.pt2 --classes 207,387 --output samples.pt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch._inductor.package import load_package


class Exported:
    """The steps of one generation, and what they store for each other."""

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path.with_suffix(".safetensors"), device=self.spec["inputs"][0]["device"])
        self.weights = [tensors[name] for name in self.spec["weights"]]
        self.models = {name: load_package(str(path), name) for name in dict.fromkeys(self.spec["steps"])}
        self.stored = [
            tensors[s["name"]] if s["given"]
            else torch.empty_strided(s["shape"], s["stride"], dtype=getattr(torch, s["dtype"]), device=s["device"])
            for s in self.spec["stored"]
        ]  # fmt: skip

    def __call__(self, step: int, **arguments: Any) -> list[torch.Tensor]:
        """The tensors that the model returns at ``step``; every generation begins at 0 and leaves none out."""
        inputs = []
        for wanted in self.spec["inputs"]:
            value: Any = arguments
            for key in wanted["path"]:
                value = value[key]
            looks = list(value.shape), str(value.dtype), value.device.type
            if looks != (wanted["shape"], f"torch.{wanted['dtype']}", wanted["device"]):  # the package checks nothing
                raise ValueError(f"{wanted['path']} is {looks}, and the package was exported for {wanted}.")
            inputs.append(value.contiguous())
        results: list[torch.Tensor] = self.models[self.spec["steps"][step]](inputs, self.weights, self.stored)
        return results


def main(argv: Sequence[str] | None = None) -> torch.Tensor:
    """Sample with DDIM for as many steps as the plan has; the latents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the .pt2 file; its .json and .safetensors stand beside it")
    parser.add_argument("--classes", default="0,1", help="one for each sample of the batch that was exported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("samples.pt"))
    args = parser.parse_args(argv)
    model = Exported(args.package)
    device = model.spec["inputs"][0]["device"]
    shape = next(wanted["shape"] for wanted in model.spec["inputs"] if wanted["path"] == ["hidden_states"])
    labels = torch.tensor([int(label) for label in args.classes.split(",")], device=device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(len(model.spec["steps"]))
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            (noise,) = model(step, hidden_states=x, timestep=t.expand(len(x)).to(device), class_labels=labels)
            x = scheduler.step(noise, t, x).prev_sample
    torch.save(x, args.output)
    print(f"{len(scheduler.timesteps)} steps, {len(model.models)} compiled models -> {args.output}")
    return x


if __name__ == "__main__":
    main()
