"""Ask for CUDA devices: the driver first, torch only when the driver reports one."""

from __future__ import annotations

import ctypes


def cuda_devices() -> tuple[int, str]:
    """(number of CUDA devices torch can use, why there are none).

    The driver is asked through ctypes because importing torch costs seconds, which a machine without a GPU
    need not pay to learn so. CUDA_VISIBLE_DEVICES is honoured by the driver.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, "there is no CUDA driver here (libcuda.so.1)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return 0, "the CUDA driver reports no device"
    import torch

    if not torch.cuda.is_available():
        return 0, f"the driver has a device, but torch {torch.__version__} cannot use it"
    return torch.cuda.device_count(), ""
