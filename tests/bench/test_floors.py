"""The floors: bandwidth is of what moves bytes fastest, a copy or a sum."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nybble.bench import floors

CPU, NBYTES = torch.device("cpu"), 4096


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(floors, "SOURCE_BYTES", {"cpu": NBYTES})
    monkeypatch.setattr(floors, "PRODUCT_SIZE", {"cpu": 8})


class Watch(TorchDispatchMode):
    """Names and largest tensors of the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [arg.nbytes for arg in args if isinstance(arg, torch.Tensor)]
        self.seen.append((func.overloadpacket.__name__, max(tensors)))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("copy", "read", "bandwidth"), [
    (4.0, 1.0, NBYTES), (1.0, 4.0, 2 * NBYTES), (1.25, 1.0, 1.6 * NBYTES),
], ids=["a sum", "a copy", "a copy that takes longer"])
def test_bandwidth_is_of_the_faster(copy, read, bandwidth, monkeypatch):
    seconds = {("copy_", NBYTES): copy, ("sum", NBYTES): read, ("mm", 8 * 8 * 2): 0.5}

    def time_calls(calls, device):
        with Watch() as watch:
            for call in calls:
                call()
        [operation] = watch.seen
        return [seconds[operation]] * 3

    monkeypatch.setattr(floors, "time_calls", time_calls)
    found = floors.measure_floors(CPU)
    assert found.bandwidth == pytest.approx(bandwidth)
    assert found.operations == dict.fromkeys(("float", "fp8_e4m3", "int8"), 2 * 8**3 / 0.5)


def test_a_cpu_has_floors():
    found = floors.measure_floors(CPU)
    assert found.bandwidth > 0 and min(found.operations.values()) > 0
