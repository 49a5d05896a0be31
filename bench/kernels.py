"""The kernels that Inductor makes of each piece of a model, counted on any machine: none is compiled and nothing runs.

``fused`` are calls of generated kernels (Metal, C++ or Triton), ``products`` of a library's matrix product,
``attention`` of its attention, ``others`` of what else it has. Each piece is lowered with all of its sites computing,
computing and storing, and reusing. Triton must be installed for ``--device cuda``; a GPU need not be there.

    python bench/kernels.py DiTTransformer2DModel --config '{"num_layers": 2}'
    python bench/kernels.py FluxTransformer2DModel --device cuda --cache kv:int8 --code /tmp/kernels
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tabulate import tabulate

from dqar_fx import CacheConfig
from dqar_fx.explanation import capture_model, find_model, read_config
from dqar_fx.graph.inspect import first_line
from dqar_fx.graph.kernels import lower, variants


def main(argv: list[str] | None = None) -> None:
    """Lower the pieces, write what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for dqar-fx explain: a hub id, a folder, a class of diffusers, or 'digits'")
    parser.add_argument("--config", help="a JSON file, or JSON text: config values to set")
    parser.add_argument("--device", default="mps", choices=["mps", "cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--cache", default="int8", help="int8, native, kv:int8, ...")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, help="height and width of hidden_states")
    parser.add_argument("--code", type=Path, metavar="FOLDER", help="write the generated code there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one JSON record per row there")
    args = parser.parse_args(argv)
    build = find_model(args.model, read_config(args.config) if args.config else {})
    sizes = {"batch": args.batch, "height": args.size, "width": args.size}
    _, _, capture = capture_model(build, getattr(torch, args.dtype), sizes)
    rows = []
    for number, gm in enumerate(capture.graphs):
        for label, outcome, variant, arguments in variants(gm, CacheConfig.parse(args.cache), args.device):
            row = {"graph": number, "piece": label, "outcome": outcome.value}
            try:
                made = lower(variant, arguments, label, outcome)
            except Exception as error:  # of whatever Inductor, or the device, does not know (float64 on MPS)
                rows.append({**row, "failed": first_line(error)})
                continue
            counts = {"fused": made.fused, "products": made.products, "attention": made.attentions}
            rows.append({**row, **counts, "others": " ".join(made.others)})
            if args.code:
                args.code.mkdir(parents=True, exist_ok=True)
                (args.code / f"{args.device}-{number}-{label}-{outcome.value}.py").write_text(made.code)
    if args.output:
        args.output.write_text("".join(json.dumps({**row, **vars_of(args)}) + "\n" for row in rows))
    print(tabulate(rows, headers="keys"))


def vars_of(args: argparse.Namespace) -> dict[str, str]:
    """What the rows were made for."""
    return {
        "model": args.model,
        "device": args.device,
        "cache": args.cache,
        "dtype": args.dtype,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
