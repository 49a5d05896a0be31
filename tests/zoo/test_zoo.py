"""Every transformer class of diffusers: reuse equals an eager replay bit for bit, without a line of code per model."""

import inspect

import pytest
from diffusers.models import transformers
from torch import nn

from tests.zoo import images, outside, videos
from tests.zoo.case import Case, check

CASES: dict[str, Case] = {**images.CASES, **videos.CASES, **outside.CASES}
EXCLUDED: dict[str, str] = {**images.EXCLUDED, **videos.EXCLUDED}


@pytest.mark.parametrize("name", CASES)
def test_reuse_is_what_replaying_the_attentions_would_give(name: str) -> None:
    assert check(CASES[name]).model == name.split(":", maxsplit=1)[0]


def test_every_transformer_of_diffusers_is_here_or_excluded_with_a_reason() -> None:
    classes = {
        name for name, kind in vars(transformers).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)
    }
    here = {name.split(":")[0] for name in CASES}  # "Class:variant" is another configuration of a class
    assert classes <= here | set(EXCLUDED)
    assert not here & set(EXCLUDED)
    assert all(EXCLUDED.values())
