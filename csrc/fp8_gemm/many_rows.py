"""Many tokens in FP8: torch's product with scales by token and channel, where torch has it for the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...plugins.log import get_logger
from ..quantize import Quantized

log = get_logger(__name__)

MANY_TOKENS = 256
"""On an H100, at Llama-3-8B's shapes, CUTLASS's tiles take 1.05 to 1.24 times as long as torch's product from here on,
0.75 to 1.1 times at 128 tokens."""
N_MULTIPLE = 16


def fits(rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch can multiply by a matrix of `rows` outputs that CUTLASS can."""
    return dtype == torch.bfloat16 and rows % N_MULTIPLE == 0 and rowwise_missing(device) is None


@cache
def rowwise_missing(device: torch.device) -> str | None:
    """Why torch's FP8 product with scales by row is not for a device, tried once a process; None when it is."""
    if device.type == "cuda" and not cublas_has_rows(torch.version.cuda):
        return f"cuBLAS has it from CUDA 12.9 on, this torch has {torch.version.cuda}"
    codes = torch.zeros(N_MULTIPLE, N_MULTIPLE, device=device).to(torch.float8_e4m3fn)
    scales = torch.ones(N_MULTIPLE, 1, device=device)
    try:
        multiply(Quantized(codes=codes, scales=scales, dtype=torch.bfloat16), codes, scales[:, 0], None)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        log.warning("many tokens in FP8 do without torch's product: %s", reason)
        return reason
    return None


def cublas_has_rows(cuda: str | None) -> bool:
    """Whether cuBLAS of a CUDA version scales rows; torch has a kernel of its own for older ones, which reads beyond
    the scales' end at some M (pytorch issue 133334)."""
    return cuda is not None and tuple(map(int, cuda.split(".")[:2])) >= (12, 9)


def multiply(x: Quantized, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K], codes [N, K] with float32 scales [N], bias [N] bfloat16 -> [M, N] bfloat16; N and K multiples of 16.

    Without fast accumulation: sums leave the tensor cores, which keep fewer bits than float32, every 128 inputs or
    sooner, and are added up in float32. Scales are multiplied into those sums, before the bias.
    """
    return torch._scaled_mm(x.codes, codes.t(), scale_a=x.scales, scale_b=scales.unsqueeze(0), bias=bias,
                            out_dtype=x.dtype, use_fast_accum=False)
