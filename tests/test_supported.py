"""A torch that is too old is named when the library is imported."""

import subprocess
import sys

import pytest

from dqar_fx.supported import check_torch


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1234", "2.13.0+cpu", "3.0.0"])
def test_what_works_is_taken(version: str) -> None:
    check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1"])
def test_what_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs torch 2\.11 or newer, and torch .* is installed\. Upgrade it"):
        check_torch(version)


def test_the_import_says_so_before_anything_else_fails() -> None:
    code = "import torch; torch.__version__ = '2.10.0'; import dqar_fx"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "ImportError: dqar_fx needs torch 2.11 or newer, and torch 2.10.0 is installed" in found.stderr
