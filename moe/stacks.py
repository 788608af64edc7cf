"""Experts stored as 3-D stacks, [E, 2 I, H] and [E, H, I], as transformers 5 keeps them: each slice to its expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..plugins.errors import CheckpointError
from ..quant import FLOAT_SOURCES, Found, Linear, Slot, Stored
from .backend import Expert

GATE_UP, DOWN = "gate_up_proj", "down_proj"


def is_stacked(prefix: str, found: Found) -> bool:
    """Whether the module "experts" stores stacks itself.

    Raises CheckpointError for stacks of codes or of scales, as transformers 5 writes when it quantizes to FP8.
    """
    other = [name for name, stored in found.items()
             if name not in (GATE_UP, DOWN) or stored.dtype not in FLOAT_SOURCES]
    if other:
        raise CheckpointError(
            f"{prefix}: experts stacked with their codes or scales are not implemented",
            found=", ".join(f"{name} {found[name].dtype} {list(found[name].shape)}" for name in other),
            known=["floating point stacks", "matrices stored expert by expert, quantized or not"],
            fix="quantize with llm-compressor, AutoAWQ or gptqmodel, which store experts one by one, or load the "
                "16-bit checkpoint with --quantization fp8",
        )
    return any(len(found[name].shape) == 3 for name in (GATE_UP, DOWN) if name in found)


def stored_apart(prefix: str, found: Found, count: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Found]:
    """The stacks of `count` experts as if every expert stored matrices of its own, named gate, up and down."""
    stacks = (found.get(GATE_UP), found.get(GATE_UP), found.get(DOWN))
    return {
        f"{prefix}.{number}.{name}": {"weight": Stored(stack.dtype, shape)}
        for number in range(count) for (name, shape), stack in zip(shapes.items(), stacks) if stack is not None
    }


def stacked_slots(prefix: str, experts: Sequence[Expert], hidden: int, intermediate: int) -> Iterator[Slot]:
    """The slots `prefix`.gate_up_proj and `prefix`.down_proj, that fill the linear layers of `experts`."""
    for expert in experts:
        for linear in expert.linears():
            linear.stored = False
    for name, size, part in ((GATE_UP, (2 * intermediate, hidden), slice(0, -1)), (DOWN, (hidden, intermediate), -1)):
        device = experts[0].down.weights["weight"].device
        target = torch.empty((), device=device).expand(len(experts), *size)  # a shape; its memory is the experts'
        yield Slot(name=f"{prefix}.{name}", target=target, sources=FLOAT_SOURCES, fill=_Filler(experts, part))


class _Filler:
    """Puts matrices of a stack into the linear layers `part` of their experts, part by part."""

    def __init__(self, experts: Sequence[Expert], part: slice | int) -> None:
        self.experts, self.part = experts, part

    def __call__(self, first: int, matrices: Tensor) -> None:
        for expert, matrix in zip(self.experts[first:], matrices):
            chosen = expert.linears()[self.part]
            layers: list[Linear] = chosen if isinstance(chosen, list) else [chosen]
            row = 0
            for slot in (slot for linear in layers for slot in linear.own_slots()):
                rows = slot.target.shape[0]
                slot.put(0, matrix[row : row + rows])
                row += rows
