"""The strict ledger: before a byte is read, every slot has a tensor or an excuse, and every tensor a use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...plugins.errors import nearest
from ...quant.base import Slot
from .header import DTYPES, TensorInfo
from .problems import Problem, name_files, refuse, template
from .scan import Checkpoint

MAX_CANDIDATES = 200
CODES = re.compile(r".*\.(qweight|weight_packed|weight_scale(_inv)?)")

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype.torch_name) for name, dtype in DTYPES.items() if dtype.torch_name
}
STORED_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Uses:
    """What becomes of every name; `tied` are the derived ones that are stored and must prove equal."""

    loaded: tuple[str, ...]
    derived: tuple[str, ...]
    defaulted: tuple[str, ...]
    ignored: tuple[str, ...]
    tied: tuple[str, ...]


class Ledger:
    """The slots of a model by name, to be matched with what a checkpoint stores.

    Args:
        slots: all of a model's slots.
        ignored: regular expression over whole names -> reason (`LoadableModel.ignored_tensors`).
    """

    def __init__(self, slots: Iterable[Slot], ignored: Mapping[str, str]) -> None:
        self.slots: dict[str, Slot] = {}
        for slot in slots:
            assert slot.name not in self.slots, f"two slots are named {slot.name}"
            self.slots[slot.name] = slot
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def match(self, checkpoint: Checkpoint) -> Uses:
        """Decide the use of every slot and of every stored tensor.

        Raises CheckpointError listing all that is missing, unknown, of a wrong shape or of a wrong dtype.
        """
        stored, slots = checkpoint.tensors, self.slots.values()
        absent = [slot for slot in slots if slot.name not in stored]
        missing = [slot for slot in absent if not (slot.optional or slot.alias)]
        extra = [name for name in stored if name not in self.slots]
        unknown = [name for name in extra if not any(rule.fullmatch(name) for rule in self._ignored)]
        problems = [
            *_missing(missing, unknown, checkpoint),
            *_misfits((slot, stored[slot.name]) for slot in slots if slot.name in stored),
            *(Problem(stored[name].file, name, self._none(name), str(stored[name])) for name in unknown),
        ]
        if problems:
            fix = "check that config.json and the weight files belong together"
            if any(CODES.fullmatch(name) for name in unknown):
                fix += "; these are quantized: has config.json lost its quantization_config?"
            raise refuse(f"the weights of {checkpoint.folder} do not fit the model", problems, fix=fix)
        return Uses(
            loaded=tuple(slot.name for slot in slots if slot.name in stored and not slot.alias),
            derived=tuple(slot.name for slot in slots if slot.alias),
            defaulted=tuple(slot.name for slot in absent if not slot.alias),
            ignored=tuple(extra),
            tied=tuple(slot.name for slot in slots if slot.name in stored and slot.alias),
        )

    def _none(self, name: str) -> str:
        """What is expected in place of a tensor that has no slot."""
        module = name.rpartition(".")[0]
        tied = any(slot.alias and slot.name.rpartition(".")[0] == module for slot in self.slots.values())
        return f"no such tensor: {module} is tied to another weight (tie_word_embeddings)" if tied else "no such tensor"


def _missing(missing: Sequence[Slot], unknown: Sequence[str], checkpoint: Checkpoint) -> Iterator[Problem]:
    """Slots without a tensor, each kind with the likeliest misspelling among the tensors without a slot."""
    spare = list(dict.fromkeys(map(template, unknown)))[:MAX_CANDIDATES]
    kinds = list(dict.fromkeys(template(slot.name) for slot in missing))[:MAX_CANDIDATES]
    hints = {kind: nearest(kind, spare) for kind in kinds}
    where = name_files(file.name for file in checkpoint.files)
    for slot in missing:
        hint = hints.get(template(slot.name))
        found = f"nothing in {where}" + (f" (but {hint} is there, and unknown)" if hint else "")
        yield Problem(None, slot.name, f"{_dtypes(slot)} {list(slot.target.shape)}", found)


def _misfits(pairs: Iterable[tuple[Slot, TensorInfo]]) -> Iterator[Problem]:
    """Tensors of another shape or type than their slots."""
    for slot, info in pairs:
        shapes = [tuple(slot.target.shape)] if slot.target.ndim else [(), (1,)]  # one value is one value
        if info.shape not in shapes or TORCH_DTYPES.get(info.dtype) not in slot.sources:
            expected = f"{_dtypes(slot)} {' or '.join(str(list(shape)) for shape in shapes)}"
            yield Problem(info.file, slot.name, expected, str(info))


def _dtypes(slot: Slot) -> str:
    return " or ".join(STORED_NAMES.get(dtype, str(dtype)) for dtype in slot.sources)
