"""How a stored value looks, checked when it is said."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dqar_fx.config import GRANULARITIES, CacheConfig
from dqar_fx.errors import CacheError

#: INT4 has scales per token only: see test_int4.
ANY_GRANULARITY = ("int8", "native")


def test_the_default_is_int8_per_token() -> None:
    assert CacheConfig() == CacheConfig(target="output", dtype="int8", granularity="token")


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *(("output", d) for d in ANY_GRANULARITY),
        *(("kv", d) for d in ANY_GRANULARITY),
        *(("kv", p) for p in itertools.permutations(ANY_GRANULARITY, 2)),
    ],
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_text_round_trips(target: str, dtype: str | tuple[str, str], granularity: str, device: str | None) -> None:
    config = CacheConfig(target, dtype, granularity, device)
    again = CacheConfig.parse(str(config))
    if dtype == "native":  # which has no scales
        again = dataclasses.replace(again, granularity=granularity)
    assert again == config


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("int8", CacheConfig()),
        ("native", CacheConfig(dtype="native")),
        ("int8:channel", CacheConfig(granularity="channel")),
        ("kv", CacheConfig("kv")),
        ("kv:native", CacheConfig("kv", "native")),
        ("kv:int8:head", CacheConfig("kv", "int8", "head")),
        ("kv:native/int8", CacheConfig("kv", ("native", "int8"))),
        ("kv:int8/native:channel@cpu", CacheConfig("kv", ("int8", "native"), "channel", "cpu")),
        ("kv:int8/int8", CacheConfig("kv")),
    ],
)
def test_command_lines_are_parsed(text: str, config: CacheConfig) -> None:
    assert CacheConfig.parse(text) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "keys"}, r"^CacheConfig\.target is 'keys'\. Use 'output' or 'kv'\.$"),
        (
            {"dtype": ("native", "int8")},
            r"^CacheConfig\.dtype is \('native', 'int8'\), a pair \(key, value\), and target is 'output', which",
        ),
        ({"target": "kv", "dtype": ("int8",)}, r"^CacheConfig\.dtype is \('int8',\)\. Give one dtype, or a pair"),
        (
            {"target": "kv", "dtype": ("int8", "fp8")},
            r"^CacheConfig\.dtype is 'fp8'\. Use 'int4' or 'int8' or 'native'\.$",
        ),
        ({"target": "kv", "dtype": ["int8", "native"]}, r"^CacheConfig\.dtype is \['int8', 'native'\]\. Use 'int4'"),
        ({"dtype": "fp8"}, r"^CacheConfig\.dtype is 'fp8'\. Use 'int4' or 'int8' or 'native'\.$"),
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
    with pytest.raises(CacheError, match="dtype is ''"):
        CacheConfig.parse("kv:native/")
    with pytest.raises(CacheError, match=r"a pair .* target is 'output'"):
        CacheConfig.parse("native/int8")


def test_each_role_is_stored_as_its_part_of_the_pair_says() -> None:
    config = CacheConfig("kv", ("native", "int8"))
    assert [config.dtype_of(role) for role in ("key", "value", "both")] == ["native", "int8", "native"]
    assert CacheConfig("kv", ("int8", "native")).dtype_of("both") == "native"
    assert CacheConfig().dtype_of("") == "int8"


def test_it_is_frozen_and_can_be_a_key() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().dtype = "native"  # type: ignore[misc]
    assert len({CacheConfig(), CacheConfig(), CacheConfig(dtype="native")}) == 2
