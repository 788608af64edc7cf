"""Triton: how a kernel begins that was launched while the one before it still ran (programmatic dependent launch)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_early(EARLY: tl.constexpr):
    """The first line of a kernel that is launched with `launch.early`: before it only weights may be read.

    What the kernels before have written is then complete. The kernel behind this one may be launched: it waits here in
    its turn, until all of this one is done.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
