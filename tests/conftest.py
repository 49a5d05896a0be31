"""One thread for all tests: the models are tiny, and OpenMP threads that wait for a busy core cost ten times the work.

Set before anything is captured, since Dynamo guards on it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

#: Half of the whole suite's time: variants of what the other files show. ``pytest -m slow`` runs these.
SLOW = frozenset(
    {
        "ecosystem/test_offloading.py",
        "pipelines/test_device_reads.py",
        "pipelines/test_guidance.py",
        "pipelines/test_img2img.py",
        "pipelines/test_interruptions.py",
        "pipelines/test_sections.py",
        "pipelines/test_sequences.py",
        "pipelines/test_timestep_values.py",
        "runtime/test_faults_of_families.py",
        "zoo/test_saved_captures.py",
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow files."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is captured before, nor left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_inference(fresh_dynamo: None) -> Iterator[None]:
    """The same, seeded and without gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
