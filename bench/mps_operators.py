"""Every operator of the rewritten graphs, and what PyTorch has for it on MPS. Nothing runs on a Mac for this.

Models of the zoo (``tests/zoo``) are captured, their pieces made for every outcome (compute, store, measure, compare,
reuse) and run on fake ``mps`` tensors; each operator is then looked up in the table that PyTorch's dispatcher is made
from. ``eager``: an MPS kernel, composite (written in other operators, or for every device), or a fall back to the CPU
(which raises unless PYTORCH_ENABLE_MPS_FALLBACK=1). ``compiled``: Inductor's Metal code generator writes it, decomposes
it first, or calls the operator. ``added``: called by what the rewriting puts in, and not by the models. ``float64``:
which MPS has not; models are captured as they are on a CPU, and those of diffusers that use it there for their rotary
embeddings ask on which device they are.

    python bench/mps_operators.py                       # a model of each kind; some minutes on one core
    python bench/mps_operators.py --classes 'Flux*' 'Wan*'
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import defaultdict
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests`, which is not installed

from dqar_fx import CacheConfig
from dqar_fx.graph.inspect import capture_graphs, first_line
from dqar_fx.graph.kernels import variants
from dqar_fx.graph.specialise import Outcome
from tests import mps
from tests.zoo.case import Case, build
from tests.zoo.test_zoo import CASES

SAMPLE = [
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel",
    "QwenImageTransformer2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel", "AuraFlowTransformer2DModel",
    "HunyuanDiT2DModel", "WanTransformer3DModel", "CogVideoXTransformer3DModel:rotary",
    "HunyuanVideoTransformer3DModel", "MochiTransformer3DModel",
    "LTXVideoTransformer3DModel", "CosmosTransformer3DModel", "StableAudioDiTModel",
]  # fmt: skip
CACHES = ("int8", "int4:group8", "kv:int8+balance")
OUTCOMES = (Outcome.COMPUTE, Outcome.STORE, Outcome.MEASURE_COMPARE, Outcome.REUSE)
MEASURES = frozenset(("entropy::", "change"))
COLUMNS = ("operator", "eager", "compiled", "added", "float64", "models")


def collect(case: Case) -> tuple[dict[Any, dict[str, Any]], list[str]]:
    """The operators of one model, with their dtypes and whether computing alone calls them; and what went wrong."""
    model = build(case)
    capture = capture_graphs(model, case.inputs(torch.Generator().manual_seed(1)))
    found: dict[Any, dict[str, Any]] = {}
    failures: list[str] = []
    for gm in capture.graphs:
        for cache in CACHES:
            for label, outcome, variant, arguments in variants(gm, CacheConfig.parse(cache), "mps", OUTCOMES, MEASURES):
                try:
                    called = mps.operators(variant.gm, arguments)
                except Exception as error:  # whatever an operator raises on fake tensors: the piece is reported
                    failures.append(f"{label} ({outcome.value}, {cache}): {first_line(error)}")
                    continue
                for operator, dtypes in called.items():
                    row = found.setdefault(operator, {"dtypes": set(), "computing": False})
                    row["dtypes"] |= dtypes
                    row["computing"] |= outcome is Outcome.COMPUTE
    return found, failures


def main(argv: list[str] | None = None) -> None:
    """Look at the models asked for, write the records, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", default=SAMPLE, help="names in tests/zoo, or patterns of them")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "mps_operators.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = [name for name in CASES if any(fnmatchcase(name, pattern) for pattern in args.classes)]
    models: dict[Any, set[str]] = defaultdict(set)
    dtypes: dict[Any, set[torch.dtype]] = defaultdict(set)
    computing: set[Any] = set()
    failures: dict[str, list[str]] = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, failed = collect(CASES[name])
        print(f"{name}: {len(found)} operators, {len(failed)} pieces failed", file=sys.stderr)
        if failed:
            failures[name] = sorted(set(failed))
        for operator, row in found.items():
            models[operator].add(name)
            dtypes[operator] |= row["dtypes"]
            if row["computing"]:
                computing.add(operator)
    rows = [
        {
            "operator": str(operator),
            "eager": mps.support(operator),
            "compiled": mps.compiled(operator),
            "added": operator not in computing,
            "float64": torch.float64 in dtypes[operator],
            "models": len(models[operator]),
            "dtypes": sorted(str(d).removeprefix("torch.") for d in dtypes[operator]),
        }
        for operator in sorted(models, key=str)
        if operator.namespace != "prim"  # asks a tensor for its device
    ]
    where = {"torch": torch.__version__, "commit": common.commit(), "date": str(date.today())}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    document = {**where, "models": names, "failures": failures, "rows": rows}
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    table = [[("" if row[c] is False else "yes" if row[c] is True else row[c]) for c in COLUMNS] for row in rows]
    print(tabulate(table, headers=COLUMNS, tablefmt="github"))
    for name, failed in failures.items():
        print(f"{name}: not looked at: {'; '.join(failed)}")
    lacking = [row["operator"] for row in rows if row["eager"] == mps.NONE]
    print(
        f"{len(rows)} operators of {len(names)} models; without an MPS kernel: {', '.join(lacking) or 'none'}. {where}"
    )


if __name__ == "__main__":
    main()
