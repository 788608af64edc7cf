"""The contract of a weight loader: fill every slot of a model, or say in one error all that is wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...quant.base import Slot


class LoadableModel(Protocol):
    """What a loader needs of a model."""

    @property
    def ignored_tensors(self) -> Mapping[str, str]:
        """Regular expression, matched against a whole checkpoint name -> why such a tensor is of no use."""

    def slots(self) -> Iterator[Slot]:
        """Every place that a checkpoint tensor fills. No two have one name."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The account of a load: every slot is in one of the first three, every other stored tensor in `ignored`.

    Attributes:
        loaded: filled from the checkpoint (or with random values).
        derived: tied to another slot and found equal, or not stored.
        defaulted: optional and not stored; kept the value its owner gave it.
        ignored: stored, and of no use by the model's own declaration.
        bytes_read: bytes of tensor data read, tied copies included.
        files: names of the weight files.
    """

    loaded: tuple[str, ...]
    derived: tuple[str, ...]
    defaulted: tuple[str, ...]
    ignored: tuple[str, ...]
    bytes_read: int
    seconds: float
    files: tuple[str, ...]


class WeightLoader(ABC):
    """A source of weights; the plugin kind "loader", chosen by `--load-format`."""

    @abstractmethod
    def load(self, model: LoadableModel, source: Path, *, seed: int, progress: bool) -> LoadReport:
        """Fill the targets of `model.slots()` in place.

        Args:
            source: the checkpoint folder.
            seed: for loaders that make weights up.
            progress: whether to show how far it is.

        Raises:
            CheckpointError: listing every tensor that is missing, unknown, misshapen or of a wrong type.
        """
