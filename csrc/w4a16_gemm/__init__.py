"""2, 3, 4 and 8-bit weights times 16-bit inputs."""

from .linear import TritonW4A16Kernel, few_rows_op
from .many_rows import MANY_TOKENS, Format, dequantize
from .packing import PackedCodes

__all__ = ["MANY_TOKENS", "Format", "PackedCodes", "TritonW4A16Kernel", "dequantize", "few_rows_op"]
