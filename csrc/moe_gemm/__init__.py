"""Products of a layer of experts: rows gathered by expert, weights of 2 to 16 bits."""

from .stacks import CodedStack, PackedStack, Stack

__all__ = ["CodedStack", "PackedStack", "Stack"]
