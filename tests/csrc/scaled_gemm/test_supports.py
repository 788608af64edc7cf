"""What the Triton kernels of 8-bit weights refuse, each with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.csrc.scaled_gemm import TritonScaledKernel, TritonWeightOnlyKernel
from nybble.csrc.scaled_gemm.linear import TILES, tiles_within
from nybble.csrc.scheme import Activation, Scheme
from nybble.csrc.select import Problem

FP8, INT8 = Activation(dtype="fp8_e4m3", scale="token"), Activation(dtype="int8", scale="token")
PROBLEM = Problem(scheme=Scheme(code="fp8_e4m3", bits=8, activation=FP8), rows=64, columns=256, dtype=torch.bfloat16,
                  device=torch.device("cuda"), scale_rows=True)
BOTH = (TritonScaledKernel, TritonWeightOnlyKernel)


@pytest.fixture
def capability(monkeypatch):
    """capability(8, 9): what the device has."""
    def have(*found):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr("nybble.csrc.launch.find_spec", lambda name: object())

    have(9, 0)
    return have


CHANGES = [
    (BOTH, dict(device=torch.device("cpu")), "runs on CUDA, not on cpu"),
    (BOTH, dict(scheme=dict(code="uint")), "multiplies fp8_e4m3 or int8 codes"),
    (BOTH, dict(dtype=torch.float32), "gives 16-bit outputs, not float32"),
    (BOTH, dict(even=False), "inputs must be in order"),
    (BOTH, dict(scheme=dict(act_order=True)), "inputs must be in order"),
    (BOTH, dict(scheme=dict(group=48)), "groups of a multiple of 32 inputs, not [48]"),
    (BOTH, dict(scheme=dict(group=128, activation=Activation(dtype="fp8_e4m3", scale="group", group=16))),
     "groups of a multiple of 32 inputs, not [128, 16]"),
    (BOTH[:1], dict(scheme=dict(activation=None)), "multiplies fp8_e4m3 weights by fp8_e4m3 inputs"),
    (BOTH[:1], dict(scheme=dict(activation=INT8)), "multiplies fp8_e4m3 weights by fp8_e4m3 inputs"),
]


@pytest.mark.parametrize("kernel, change, words", [(kernel, change, words) for kernels, change, words in CHANGES
                                                   for kernel in kernels])
def test_refusals(capability, kernel, change, words):
    scheme = replace(PROBLEM.scheme, **change.get("scheme", {}))
    assert kernel.supports(PROBLEM) is None
    assert words in kernel.supports(replace(PROBLEM, **{**change, "scheme": scheme}))


def test_devices(capability):
    """Ampere has no FP8 product: the weight-only kernel takes its place there; int8 runs on both."""
    int8 = replace(PROBLEM, scheme=Scheme(code="int8", bits=8, activation=INT8))
    capability(8, 0)
    assert "needs compute capability 8.9" in TritonScaledKernel.supports(PROBLEM)
    assert TritonWeightOnlyKernel.supports(PROBLEM) is None and TritonScaledKernel.supports(int8) is None
    capability(7, 5)
    assert all("needs compute capability 8.0" in kernel.supports(int8) for kernel in BOTH)


@pytest.mark.parametrize("memory, itemsize, stages", [
    (232448, 2, (3, 4, 4, 4)), (232448, 1, (3, 4, 4, 4)),  # Hopper
    (101376, 2, (3, 4, 3, 3)), (101376, 1, (3, 4, 4, 4)),  # RTX 3090 and 4090, L4, L40S
    (1000, 2, (1, 1, 1, 1)),
])
def test_tiles_fit_the_shared_memory(memory, itemsize, stages):
    """With 16-bit inputs the large tiles took 120 and 144 KiB, of which consumer devices have 99."""
    tiles = tiles_within(memory, 128, itemsize)
    assert tuple(tile.stages for tile in tiles) == stages
    assert [(tile.n, tile.m, tile.warps) for tile in tiles] == [(tile.n, tile.m, tile.warps) for tile in TILES]
    assert memory == 1000 or all((t.stages - 1) * 128 * (t.n + t.m * itemsize) <= memory for t in tiles)
