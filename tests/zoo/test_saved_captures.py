"""Every transformer class of diffusers: a saved capture is used again, bit for bit, or refused when it is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import dqar_fx
from dqar_fx import Schedule
from tests.zoo.case import build
from tests.zoo.test_zoo import CASES

#: What cannot be saved: several graphs, open sizes, values that are no plain tensors, numpy's operators.
REFUSED = frozenset(
    {
        "AnyFlowFARTransformer3DModel",
        "AnyFlowFARTransformer3DModel:write",
        "BriaFibo2Transformer2DModel",
        "CosmosTransformer3DModel",
        "DreamLiteTransformer2DModel",
        "FluxTransformer2DModel:controlnet",
        "GlmImageTransformer2DModel:cached",
        "GlmImageTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanImageTransformer2DModel:glyphs",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel:one",
        "HunyuanVideoFramepackTransformer3DModel",
        "Kandinsky5Transformer3DModel:sparse",
        "Kandinsky6SRTransformer3DModel",
        "Lumina2Transformer2DModel",
        "MochiTransformer3DModel",
        "NucleusMoEImageTransformer2DModel",
        "OmniGenTransformer2DModel",
        "QwenImage21Transformer2DModel:cached",
        "QwenImage21Transformer2DModel",
        "StableAudioDiTModel",
        "Transformer2DModel:gligen",
        "Transformer2DModel:patches",
        "Transformer2DModel",
        "WanAnimate2Transformer3DModel",
        "ZImageTransformer2DModel",
    }
)


@pytest.mark.filterwarnings("ignore")  # those of the models; a capture that does not fit is seen by what is traced
@pytest.mark.parametrize("name", CASES)
def test_a_capture_is_used_again_or_refused_when_it_is_saved(name: str, tmp_path: Path, fresh_inference: None) -> None:
    case, path = CASES[name], tmp_path / "capture"
    inputs = case.inputs(torch.Generator().manual_seed(0))
    saved = build(case)
    if name in REFUSED:
        with pytest.raises(dqar_fx.SavedError):
            dqar_fx.save_compiled(saved, inputs, path)
        assert not path.exists()
        return
    dqar_fx.save_compiled(saved, inputs, path)
    torch._dynamo.reset()
    loaded = build(case)
    loaded.load_state_dict(saved.state_dict())
    results = []
    for model in (loaded, saved):
        dqar_fx.optimize(model, Schedule.none(4), backend="eager")
        if model is loaded:
            dqar_fx.load_compiled(model, path)
        counters.clear()
        torch.manual_seed(0)
        results.append(model(**inputs))
        assert bool(counters["stats"]["unique_graphs"]) == (model is saved)
        torch._dynamo.reset()
    assert type(results[0]) is type(results[1])
    found, expected = ([x for x in tree_leaves(_plain(r)) if isinstance(x, torch.Tensor)] for r in results)
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


def _plain(result: object) -> object:
    """Diffusers' outputs are dictionaries that pytree takes for leaves."""
    return list(result.values()) if isinstance(result, dict) else result
