"""KVScales: what a checkpoint stores to quantize a layer's keys and values with, under every name it goes by."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch

from ..plugins.errors import CheckpointError
from .base import Slot

# How tools name the scales of k and of v beside their attention: compressed-tensors and AutoFP8; AutoFP8 before it
# told them apart; ModelOpt; AutoFP8's first files; vLLM's own module tree.
SPELLINGS = (
    ("k_scale", "v_scale"),
    ("kv_scale", "kv_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("attn.k_scale", "attn.v_scale"),
)
# No type that a scale is stored in holds this number: a slot that still has it was not filled.
UNFILLED = -1e300


class KVScales:
    """The scales of an FP8 key and value cache of one attention layer: a cached value times its scale is the value.

    Args:
        prefix: checkpoint name of the attention module ("model.layers.0.self_attn").
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        names = dict.fromkeys(name for pair in SPELLINGS for name in pair)
        self._values = {name: torch.tensor(UNFILLED, dtype=torch.float64, device="cpu") for name in names}

    def slots(self) -> Iterator[Slot]:
        for name, value in self._values.items():
            yield Slot(name=f"{self._prefix}.{name}", target=value, optional=True)

    def read(self) -> tuple[float, float] | None:
        """(scale of k, scale of v), once the slots are filled; None when nothing is stored.

        Raises CheckpointError for a scale that is not positive and finite, one without the other, and names that
        disagree.
        """
        stored = {name: value.item() for name, value in self._values.items() if value != UNFILLED}
        if not stored:
            return None
        wrong = [name for name, value in stored.items() if not (isfinite(value) and value > 0)]
        if wrong:
            raise self._refuse("a scale of the KV cache must be positive and finite", {n: stored[n] for n in wrong},
                               "the file is damaged, or its writer failed: fetch or quantize the model again")
        for pair in SPELLINGS:
            lacking = [name for name in pair if name not in stored]
            if len(lacking) == 1:
                raise self._refuse(f"a scale of the KV cache is stored without its other half, {lacking[0]}", stored,
                                   "fetch the checkpoint again, or take the half out")
        scales = {tuple(stored[name] for name in pair) for pair in SPELLINGS if pair[0] in stored}
        if len(scales) > 1:
            raise self._refuse("the scales of the KV cache are stored under two names that disagree", stored,
                               "take the wrong ones out of the checkpoint")
        [(k, v)] = scales
        return k, v

    def _refuse(self, what: str, stored: dict[str, float], fix: str) -> CheckpointError:
        return CheckpointError(f"{self._prefix}: {what}", fix=fix,
                               found=", ".join(f"{name} = {value:g}" for name, value in stored.items()))
