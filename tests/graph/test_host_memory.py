"""What pieces on the CPU have freed stays with the process; counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such threshold")

#: Three buffers of 20 MiB, mapped at first, are more than twice the largest chunk that was ever mapped: freed, they go
#: back to the system, unless it was told better.
FAULTS = """
import resource
import numpy

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [numpy.ones(20 * 2**20, numpy.uint8) for _ in range(3)]
    del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), faults()
print(min(faults() for _ in range(3)))
"""
OPTIMISED = """
import torch
from diffusers import DiTTransformer2DModel
import dqar_fx

model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4,
                              num_embeds_ada_norm=2).eval().requires_grad_(False)
dqar_fx.optimize(model, dqar_fx.Schedule.interval(4, every=2), backend="eager")
with torch.no_grad():
    model(torch.randn(1, 4, 4, 4), timestep=torch.tensor([9]), class_labels=torch.tensor([0]))
"""
#: The heap's top must be what the buffers are taken from, and huge pages would count as one fault each.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "NUMPY_MADVISE_HUGEPAGE": "0"}


def faults_after(code: str, **environment: str) -> int:
    """Page faults of taking 60 MiB once more, in a process that has run ``code`` before."""
    done = subprocess.run(
        [sys.executable, "-c", code + FAULTS], env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def test_freed_memory_is_kept() -> None:
    told = "from dqar_fx.graph.host_memory import keep_freed_memory\nassert keep_freed_memory()\n"
    untold = "import dqar_fx.graph.host_memory\n"
    assert faults_after(untold) > 10_000
    assert faults_after(told) < 100


def test_optimised_models_keep_it() -> None:
    without = "import dqar_fx.graph.lower as lower\nlower.keep_freed_memory = lambda: False\n"
    assert faults_after(without + OPTIMISED) > 10_000
    assert faults_after(OPTIMISED) < 100


def test_settings_of_the_user_are_left() -> None:
    told = "from dqar_fx.graph.host_memory import keep_freed_memory\nkeep_freed_memory()\n"
    assert faults_after(told, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="268435456") > 10_000
