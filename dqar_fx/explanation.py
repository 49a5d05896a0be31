"""What a model has to reuse, and what that can save at most: told without running it.

Nothing is measured and nothing compiled. The model is built from its config on tensors without data, captured by
Dynamo, and its FLOP are counted on the graph.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dqar_fx.config import CacheConfig
from dqar_fx.errors import CaptureError
from dqar_fx.example_inputs import example_inputs, wants_values
from dqar_fx.graph.ahead import timestep_values
from dqar_fx.graph.attentions import is_attention, is_fused_layer
from dqar_fx.graph.flops import Work, speedup_bound
from dqar_fx.graph.inspect import Capture, capture_graphs, describe
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lossless import mark_lossless
from dqar_fx.graph.savings import NOTHING, savings
from dqar_fx.graph.sites import Region
from dqar_fx.plan import Plan
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.lossless import constant_inputs, timestep_source
from dqar_fx.runtime.plans import reading_exact
from dqar_fx.schedule import Schedule

#: Below this bound, what storing and reading cost eats most of what is left to gain.
HARDLY_PAYS = 1.05
#: Samplers of so few steps are distilled: neighbouring steps differ so much that little can be reused.
FEW_STEPS = 8
#: A model that must see values is given random weights on the CPU; a larger one than this would take minutes.
MAX_PARAMETERS_ON_CPU = 100_000_000


def explain(
    name: str,
    schedule: Schedule | Plan,
    cache: CacheConfig,
    *,
    config: Mapping[str, Any] | None = None,
    patterns: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    sizes: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """All that ``dqar-fx explain`` prints, as numbers, strings, lists and dicts.

    Args:
        name: of the model, see ``find_model``.
        schedule: which attention reuses at which step; also says how many steps there are.
        cache: how stored values look.
        config: config values on top of the model's own.
        patterns: ``fnmatch`` patterns of the site paths to rewrite; None for all.
        dtype: what the model computes in.
        sizes: of the inputs, see ``example_inputs``.

    Raises:
        DqarError: the model is unknown, cannot be captured or has no attention, or an argument has no meaning.
    """
    build = find_model(name, config or {})
    model, inputs, capture = capture_model(build, dtype, dict(sizes or {}))
    left: list[dict[str, str]] = []
    regions: list[list[Region]] = []
    paths: list[str] = []
    whole = len(capture.graphs) == 1 and not capture.breaks
    constant = partial(constant_inputs, latents=_latents(model)) if cache.lossless and whole else None
    operators = written_out = 0  # attentions that are one operator, and those that are found in graphs only
    for gm in capture.graphs:
        own: list[Region] = []
        fused = {node.name for node in gm.graph.nodes if is_attention(node) or is_fused_layer(node)}
        operators += len(fused)
        for region in find_stored(gm, cache.target):
            site = region.site
            written_out += fused.isdisjoint(region.attentions)
            paths.append(site.path)
            if not site.reason and patterns and not any(fnmatchcase(site.path, p) for p in patterns):
                site = replace(site, reason="not selected by --sites")
            if site.reason:
                left.append({"path": site.path, "kind": site.kind, "reason": site.reason})
            else:
                index = sum(map(len, regions)) + len(own)
                own.append(replace(region, site=replace(site, index=index)))
        if constant is not None:
            own = mark_lossless(gm, own, constant)
        regions.append(own)
    if not paths:
        raise CaptureError(
            f"no attention was found in {type(model).__name__}: it calls an attention operator such as "
            f"torch.nn.functional.scaled_dot_product_attention "
            f"{'only outside of the graphs that Dynamo captures' if capture.attentions else 'nowhere'}, and no module "
            f"that is called an attention multiplies activations. Only these, in a captured graph, can be reused."
        )
    if patterns and all(entry["reason"] == "not selected by --sites" for entry in left) and not any(regions):
        raise CaptureError(f"--sites {' '.join(patterns)} matches none of the sites. Their paths: {', '.join(paths)}.")
    work = Work(capture.graphs, regions, cache, constant)
    sites = [region.site for graph in work.graphs for region in graph.regions]
    plan = schedule.plan(len(sites)) if sites else None
    exact = [site.index for site in sites if site.lossless]
    reuse = reading_exact(plan, exact).reuse if plan else np.zeros((1, 0), bool)
    hoists = bool(reuse.any())  # a schedule that reuses nothing computes what is exact as well
    saved = [work.total - work.of(row.tolist(), hoisted=hoists and step > 0) for step, row in enumerate(reuse)]
    hoisted = next((savings(g.hoisted) for g in work.graphs if hoists and g.hoisted is not None), NOTHING)
    timed = None
    if constant is not None and hoists:
        timed = timestep_values(work.graphs[0].lifted, regions[0], constant, timestep_source, len(reuse))
    planned = reuse.mean(axis=0).tolist() if plan else []
    everything = work.saved_together()
    rows = [
        {
            "index": site.index,
            "path": site.path,
            "kind": site.kind,
            "owner": site.owner,
            "lossless": site.lossless,
            "exits": len(site.exits),
            "shapes": [[str(size) for size in shape] for shape in site.shapes],
            "flop_share": saving / work.total if work.total else 0.0,
            "planned_reuse": ratio,
            "cache_bytes": stored,
            "native_bytes": native,
        }
        for site, saving, ratio, stored, native in zip(
            sites, work.site_savings(), planned, work.site_bytes(), work.native_bytes(), strict=True
        )
    ]
    found = {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "inputs": describe(inputs),
        "gflop_per_call": work.total / 1e9,
        "captures": len(capture.graphs),
        "graph_breaks": [{"reason": b.reason, "where": b.where} for b in capture.breaks],
        "attentions": written_out + capture.attentions,
        "attentions_captured": written_out + operators,
        "schedule": str(schedule),
        "cache": str(cache),
        "stored": "keys and values" if cache.target == "kv" else "outputs",
        "num_steps": plan.num_steps if plan else None,
        "planned_reuse_ratio": float(reuse.mean()) if plan else 0.0,
        "sites": rows,
        "flop_share": everything / work.total if work.total else 0.0,
        "cache_bytes": sum(row["cache_bytes"] for row in rows),
        "native_bytes": sum(row["native_bytes"] for row in rows),
        "hoisted": {
            "values": hoisted.values,
            "bytes": hoisted.bytes,
            "flop_share": hoisted.flop_share,
            "weight_bytes": hoisted.weight_bytes,
            "weight_share": hoisted.weight_share,
        },
        "timestep_values": {
            "values": len(timed.names) if timed is not None else 0,
            "bytes": timed.step_bytes * len(reuse) if timed is not None else 0,
            "weight_bytes": timed.weight_bytes if timed is not None else 0,
            "weight_share": timed.weight_share if timed is not None else 0.0,
        },
        "bound": speedup_bound(work.total, saved),
        "limit": speedup_bound(work.total, [everything]),
        "left_computing": left,
        "uncounted": list(work.uncounted),
    }
    found["advice"] = _advice(found)
    return found


def _latents(model: nn.Module) -> str:
    """Name of the argument that holds the latents: the first but the timestep."""
    names = list(inspect.signature(model.forward).parameters)
    timestep = timestep_argument(names)
    return next((name for name in names if timestep is None or name != timestep[0]), "")


def _advice(found: Mapping[str, Any]) -> list[str]:
    advice = []
    outside = found["attentions"] - found["attentions_captured"]
    if outside > 0:
        advice.append(
            f"{outside} of {found['attentions']} attentions run outside of the captured graphs (see the graph breaks); "
            f"they are neither reused nor counted."
        )
    if not found["sites"]:
        return [*advice, "nothing can be reused."]
    idle = [site["path"] for site in found["sites"] if not site["flop_share"]]
    if idle and found["stored"] == "keys and values":
        advice.append(
            f"reading the keys and values of {len(idle)} sites back saves nothing ({', '.join(idle[:3])}"
            f"{', ...' if len(idle) > 3 else ''}): queries, which stay fresh, need what leads to them, as where one "
            f"projection makes all three. Store outputs there."
        )
    if found["bound"] < HARDLY_PAYS:
        advice.append(
            f"reuse will hardly pay here: even without any cost of its own this schedule makes sampling at most "
            f"{found['bound']:.3f} times as fast. Reuse pays by sequence length and by the share of steps that reuse."
        )
    if found["num_steps"] <= FEW_STEPS:
        advice.append(
            f"reuse will hardly pay in {found['num_steps']} steps: so few differ too much from each other to share "
            f"attentions without a visible loss."
        )
    return advice


def find_model(name: str, config: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """How to build the model that ``name`` stands for, with ``config`` on top of its own; see below.

    A name is a hub id, a folder of a transformer or of a pipeline, a config file, the name of a diffusers transformer
    class, or ``"digits"``, the model that ships. Only configs are read, never weights.

    Raises:
        CaptureError: there is no such model, or its config cannot be read; the message names near ones.
    """
    kind, own = _read_class(name)
    merged = {**own, **config}
    return lambda: _from_config(kind, merged)


def read_class(name: str) -> Any:
    """The diffusers class of the model that ``name`` stands for, see ``find_model``.

    Raises:
        CaptureError: as ``find_model``.
    """
    return _read_class(name)[0]


def _read_class(name: str) -> tuple[Any, dict[str, Any]]:
    """The class of a model, and its config."""
    import diffusers

    path = Path(name).expanduser()
    if name == "digits":
        text = (files("dqar_fx") / "assets" / "digits_dit.json").read_text(encoding="utf-8")
        own = {"_class_name": "DiTTransformer2DModel", **json.loads(text)["model"]}
    elif path.is_file():
        own = _parse_config(path)
    elif path.is_dir():
        candidates = [path / "transformer" / "config.json", path / "config.json"]
        place = next((p for p in candidates if p.is_file()), None)
        if place is None:
            raise CaptureError(f"{path} has no config.json and no transformer/config.json. Give a diffusers folder.")
        own = _parse_config(place)
    elif hasattr(diffusers, name):
        own = {"_class_name": name}
    elif "/" in name:
        own = _from_hub(name)
    else:
        raise CaptureError(f"there is no model {name!r}{_near(name)}")
    class_name = str(own.get("_class_name", ""))
    kind = getattr(diffusers, class_name, None)
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        what = f"{class_name!r} is no model class of diffusers" if class_name else "its config names no class"
        raise CaptureError(f"{name}: {what}{_near(class_name or name)}")
    return kind, own


def _from_config(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every key of a config that this version does not know
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what diffusers will change some day
            model: nn.Module = kind.from_config(dict(config))
    except Exception as error:
        raise CaptureError(
            f"{kind.__name__} cannot be built from its config: {type(error).__name__}: {error}. "
            f"Set what is missing with --config '{{\"key\": value}}'."
        ) from error
    finally:
        log.setLevel(level)
    return model.eval().requires_grad_(False)


def capture_model(
    build: Callable[[], nn.Module], dtype: torch.dtype, sizes: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any], Capture]:
    """On tensors without data if the model can run on them; else, if it is small, with random weights on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _cast(build(), dtype)
    try:
        inputs = example_inputs(model, **sizes)
        return model, inputs, capture_graphs(model, inputs)
    except CaptureError as error:
        if not wants_values(error.__cause__):
            raise
        count = sum(p.numel() for p in model.parameters())
        if count > MAX_PARAMETERS_ON_CPU:
            raise CaptureError(
                f"{type(model).__name__} looks at values while it runs ({error.__cause__}), so it cannot be explained "
                f"without weights, and with {count / 1e9:.1f} G parameters it is too large to be given random ones. "
                f"Use --config for a smaller one of its kind, or print dqar_fx.runtime(model).report() after a call "
                f"of the optimised model."
            ) from error
    with torch.random.fork_rng(devices=[]):  # the caller's seed must not move
        model = _cast(build(), dtype)
    inputs = example_inputs(model, **sizes)
    return model, inputs, capture_graphs(model, inputs)


def build_model(name: str, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model that ``name`` stands for (see ``find_model``), with random weights, to be run.

    Raises:
        CaptureError: as ``find_model``.
    """
    build = find_model(name, config)
    with torch.random.fork_rng(devices=[]), torch.device(device):  # the caller's seed must not move
        torch.manual_seed(0)
        return _cast(build(), dtype).to(device)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model.to(dtype)``, which torch refuses for fake parameters."""
    cast: dict[int, torch.Tensor] = {}  # a tied parameter stays one

    def convert(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in cast:
            new = value.to(dtype) if value.is_floating_point() else value
            cast[id(value)] = nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new
        return cast[id(value)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            table.update({name: convert(value) for name, value in table.items() if value is not None})  # type: ignore[misc]  # a parameter stays one
    return model


def read_config(text: str) -> dict[str, Any]:
    """Config values from JSON text, or from a file of that name.

    Raises:
        CaptureError: it is not JSON, or not an object.
    """
    return _parse_config(text) if text.lstrip().startswith("{") else _parse_config(Path(text).expanduser())


def _parse_config(source: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaptureError(f"the config {str(source)!r} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CaptureError(f"the config {str(source)!r} is a {type(value).__name__}. Give a JSON object.")
    return value


def _from_hub(name: str) -> dict[str, Any]:
    from diffusers import DiTTransformer2DModel  # any model: they all read any model's config

    failures = []
    for subfolder in ("transformer", None):
        try:
            loaded = DiTTransformer2DModel.load_config(name, subfolder=subfolder)
        except (OSError, ValueError) as error:  # noqa: PERF203  # two places are looked at, not many
            failures.append(error)
        else:
            return dict(loaded)
    raise CaptureError(
        f"{name!r} is no folder, and the hub gives no transformer/config.json or config.json for it: {failures[0]}"
    ) from failures[0]


def _near(name: str) -> str:
    from diffusers.models import transformers

    known = [n for n, kind in vars(transformers).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)]
    lower = {n.lower(): n for n in [*known, "digits"]}
    close = [lower[n] for n in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"{hint} Give a hub id (owner/name), a folder, a diffusers transformer class or 'digits'."
