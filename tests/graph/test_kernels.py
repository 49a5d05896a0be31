"""The kernels of a DiT block on devices that need not be there: Metal, C++, and Triton where it is installed.

Reading back is one kernel with the gate, the residual and the norm behind it; storing in INT8 adds no kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dqar_fx import CacheConfig
from dqar_fx.graph.inspect import capture_graphs
from dqar_fx.graph.kernels import OUTCOMES, Lowered, lower_pieces
from dqar_fx.graph.pays import kernels_added
from dqar_fx.graph.specialise import Outcome

BLOCK = "transformer_blocks.1"  # block 0 differs: its input comes with other strides
#: How a kernel says that it is given int8 values, and that it normalises.
READS_INT8 = {"mps": r"constant char\*", "cpu": r"const int8_t\*", "cuda": r"in_ptr\d+': '\*i8'"}
NORMALISES = {"mps": r"metal::precise::rsqrt\(", "cpu": r"\.rsqrt\(\)|std::sqrt\(", "cuda": r"libdevice\.rsqrt\("}
#: What a block takes to compute: kernels that were generated, matrix products, attentions, and others of a library's.
#: Metal's attention hands on its heads in order, which one more kernel puts back.
COMPUTE = {"mps": (6, 9, 1, 0), "cpu": (5, 9, 1, 0), "cuda": (5, 9, 1, 0)}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICES = ["mps", "cpu", pytest.param("cuda", marks=needs_triton)]


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@functools.cache
def captured(dtype: torch.dtype) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2, sample_size=32,
            patch_size=2, num_embeds_ada_norm=10,
        ).eval().requires_grad_(False)  # fmt: skip
        for module in model.modules():
            module._parameters.update(
                {
                    k: torch.nn.Parameter(p.to(dtype), requires_grad=False)
                    for k, p in module._parameters.items()
                    if p is not None
                }
            )
        inputs = {
            "hidden_states": torch.empty(2, 4, 32, 32, dtype=dtype),
            "timestep": torch.full((2,), 900),
            "class_labels": torch.tensor([1, 2]),
        }
    return capture_graphs(model, inputs).graphs[0]


@functools.cache
def block(
    device: str, cache: str, outcomes: tuple[Outcome, ...] = OUTCOMES, dtype: torch.dtype = torch.float32
) -> list[Lowered]:
    """The second block under each of the outcomes."""
    found = lower_pieces(captured(dtype), CacheConfig.parse(cache), device, outcomes=outcomes, labels={BLOCK})
    return list(found)


@pytest.mark.parametrize("device", DEVICES)
def test_quantise_adds_no_kernel_and_reuse_drops_the_attention(device: str) -> None:
    compute, store, reuse = block(device, "int8")
    assert compute.counts == store.counts == COMPUTE[device]
    fused, products, _, _ = COMPUTE[device]
    # Q, K, V, the out-projection, the norm before them, and on Metal the kernel behind the attention.
    assert reuse.counts == (4, products - 4, 0, 0)
    assert fused - 4 == (2 if device == "mps" else 1)


@pytest.mark.parametrize("device", DEVICES)
def test_dequantise_gate_residual_and_norm_are_one_kernel(device: str) -> None:
    _, store, reuse = block(device, "int8")
    readers = [source for source in reuse.sources.values() if re.search(READS_INT8[device], source)]
    assert len(readers) == 1
    assert re.search(NORMALISES[device], readers[0])  # the norm that follows the residual
    assert not any(re.search(READS_INT8[device], source) for source in store.sources.values())


def test_on_metal_int8_values_are_read_and_written_as_bytes() -> None:
    _, store, reuse = block("mps", "int8")
    writers = [source for source in store.sources.values() if "device char*" in source]
    assert len(writers) == 1
    for rounding in ("threadgroup_max(", "metal::rint(", "static_cast<char>("):
        assert rounding in writers[0]
    assert "metal::precise::rsqrt(" in writers[0]  # in the kernel that normalises anyway
    assert not any(re.search(r"\bdouble\b", source) for source in (*store.sources.values(), *reuse.sources.values()))


def test_on_metal_half_precision_is_the_same() -> None:
    store, reuse = block("mps", "int8", (Outcome.STORE, Outcome.REUSE), torch.float16)
    assert store.counts == COMPUTE["mps"]
    assert reuse.counts == (4, 5, 0, 0)
    assert sum("constant char*" in source for source in reuse.sources.values()) == 1


@pytest.mark.parametrize(
    ("cache", "stores", "reads"),
    [
        ("int4", 1, 0),  # half as many bytes as there are values: nothing else has that size
        ("int8+balance", 2, 0),  # a channel's salience goes over all tokens
        ("kv:int8", 2, 2),  # between a library's matrix product and its attention: nothing to fuse with
        ("kv:int8+balance", 3, 3),  # the salience of the keys, and what undoes it in the queries
    ],
)
def test_what_other_caches_add_on_metal(cache: str, stores: int, reads: int) -> None:
    store, reuse = block("mps", cache, (Outcome.STORE, Outcome.REUSE))
    fused, products, attentions, _ = COMPUTE["mps"]
    roles = ("key", "value") if cache.startswith("kv") else ("",)
    assert sum(kernels_added(CacheConfig.parse(cache), role) for role in roles) == stores + reads  # as is estimated
    assert store.counts == (fused + stores, products, attentions, 0)
    if cache.startswith("kv"):
        assert reuse.counts == (fused + reads, products - 2, attentions, 0)
    else:
        assert reuse.counts == (4 + reads, products - 4, 0, 0)
