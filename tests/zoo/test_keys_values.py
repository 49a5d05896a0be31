"""Keys and values of a handful of classes: reuse equals an eager replay bit for bit."""

import pytest

from tests.zoo.keys_values import check_keys_and_values
from tests.zoo.test_zoo import CASES

#: Class and variant: how many attention operators an evaluation calls, each of which is a site.
OPERATORS = {
    "SD3Transformer2DModel:dual": 5,
    "Flux2Transformer2DModel": 4,
    "StableAudio3DiTModel": 8,  # differential attention: two operators in each module
    "WanTransformer3DModel": 6,  # an image beside the prompt: two operators in the cross-attention
    "LatteTransformer3DModel": 6,
    "MochiTransformer3DModel": 5,  # samples apart, and of sizes that are found in the mask
    "PatchDenoiser:inline": 2,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_reuse_is_what_the_stored_keys_and_values_give(name: str) -> None:
    check_keys_and_values(CASES[name], OPERATORS[name])
