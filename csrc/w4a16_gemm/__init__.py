"""2, 3, 4 and 8-bit weights times 16-bit inputs."""

from .linear import TritonW4A16Kernel, few_rows_op
from .packing import PackedCodes

__all__ = ["PackedCodes", "TritonW4A16Kernel", "few_rows_op"]
