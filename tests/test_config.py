"""How a stored value looks, checked when it is said."""

from __future__ import annotations

import dataclasses

import pytest

from dqar_fx.config import DTYPES, GRANULARITIES, CacheConfig
from dqar_fx.errors import CacheError


def test_the_default_is_int8_per_token() -> None:
    assert CacheConfig() == CacheConfig(target="output", dtype="int8", granularity="token")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_text_round_trips(dtype: str, granularity: str) -> None:
    config = CacheConfig(dtype=dtype, granularity=granularity)
    again = CacheConfig.parse(str(config))
    assert again.dtype == dtype
    assert dtype == "native" or again == config  # a native value has no scales


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("int8", CacheConfig()),
        ("native", CacheConfig(dtype="native")),
        ("int8:channel", CacheConfig(granularity="channel")),
    ],
)
def test_command_lines_are_parsed(text: str, config: CacheConfig) -> None:
    assert CacheConfig.parse(text) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "kv"}, r"^CacheConfig\.target is 'kv'\. Use 'output'\.$"),
        ({"dtype": "fp8"}, r"^CacheConfig\.dtype is 'fp8'\. Use 'int8' or 'native'\.$"),
        (
            {"granularity": "row"},
            r"^CacheConfig\.granularity is 'row'\. Use 'token' or 'tensor' or 'channel' or 'head'\.$",
        ),
        ({"dtype": None}, r"^CacheConfig\.dtype is None"),
    ],
)
def test_what_is_not_known_is_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        CacheConfig(**arguments)


def test_a_wrong_text_is_refused() -> None:
    with pytest.raises(CacheError, match="granularity is 'row'"):
        CacheConfig.parse("int8:row")
    with pytest.raises(CacheError, match="dtype is ''"):
        CacheConfig.parse("")


def test_it_is_frozen_and_can_be_a_key() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().dtype = "native"  # type: ignore[misc]
    assert len({CacheConfig(), CacheConfig(), CacheConfig(dtype="native")}) == 2
