"""One family of errors: what a caller may catch them as."""

import pytest

from dqar_fx import errors
from dqar_fx.errors import CacheError, CaptureError, DqarError, PlanError, RuntimeStateError, ScheduleError


@pytest.mark.parametrize("kind", [ScheduleError, PlanError, CaptureError, CacheError])
def test_wrong_values_are_value_errors_of_the_family(kind: type[DqarError]) -> None:
    assert issubclass(kind, DqarError)
    assert issubclass(kind, ValueError)


def test_calls_at_the_wrong_time_are_runtime_errors_and_no_value_errors() -> None:
    assert issubclass(RuntimeStateError, DqarError)
    assert issubclass(RuntimeStateError, RuntimeError)
    assert not issubclass(RuntimeStateError, ValueError)


def test_the_base_is_neither_so_that_catching_value_errors_does_not_catch_everything() -> None:
    assert DqarError.__bases__ == (Exception,)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_says_when_it_is_raised(name: str) -> None:
    kind = getattr(errors, name)
    assert "rais" in (kind.__doc__ or "").lower()
    with pytest.raises(DqarError, match=r"^what, where, what to do$"):
        raise kind("what, where, what to do")
