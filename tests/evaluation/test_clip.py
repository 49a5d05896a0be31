"""The CLIP score, with a tiny random CLIP in a folder."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch

from dqar_fx.errors import MetricError
from dqar_fx.evaluation.perceptual import clip_score

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *string.digits]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(names), "bos_token_id": len(names) - 2, "eos_token_id": len(names) - 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in (model.visual_projection.weight, model.text_projection.weight):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_the_score_by_the_parts_of_the_model(folder: Path) -> None:
    images = torch.rand(66, 1, 16, 16, generator=torch.Generator().manual_seed(0))  # more than one batch
    prompts = [f"digit {i % 10}" for i in range(66)]
    found = clip_score(CPU, str(folder))(images, prompts)
    assert (found.dtype, found.shape) == (torch.float64, (66,))
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(str(folder))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)  # OpenAI's, which CLIP was trained with
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    expected = []
    with torch.no_grad():
        for image, prompt in zip(images, prompts, strict=True):
            pixels = ((image * 255).round() / 255).expand(3, -1, -1)
            vision = model.visual_projection(model.vision_model(((pixels - mean) / std)[None]).pooler_output)
            ids = tokens(prompt, return_tensors="pt").input_ids
            text = model.text_projection(model.text_model(ids).pooler_output)
            expected.append(100 * max(0.0, float(torch.cosine_similarity(vision, text))))
    assert found.tolist() == pytest.approx(expected, abs=0.01)
    assert max(expected) > 1


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="the CLIP score cannot be measured"):
        clip_score(CPU, str(tmp_path))
