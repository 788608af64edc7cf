"""SamplingMetadata: all the sampler knows of one step besides the logits. None: no row uses the feature."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .processors import Job


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Rows with a penalty: `index` [R] in the logits, `state_rows` [R] in the counters, and their settings.

    `output_counts` [max_rows, V] int32 and `prompt_mask` [max_rows, V] bool are the state's own, read when
    sampling.
    """

    index: Tensor
    state_rows: Tensor
    output_counts: Tensor
    prompt_mask: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, kw_only=True)
class TopKTopP:
    """Rows with top-k or top-p: `index` [F] among the random rows (None: all) and their settings [F].

    `top_k` is int64 (0 is off), `top_p` float64 (1 is off); `max_k` is the largest k that is on.
    """

    index: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    max_k: int


@dataclass(frozen=True, kw_only=True)
class RandomRows:
    """Rows that are not greedy: `index` [R] in the logits (None: all), and their settings [R] float32."""

    index: Tensor | None
    temperature: Tensor
    min_p: Tensor | None
    top: TopKTopP | None


@dataclass(frozen=True, kw_only=True)
class SamplingMetadata:
    """One step of S logits rows.

    Attributes:
        random: the rows that are not greedy; None when all are.
        uniforms: [R] float64 in [0, 1), this step's random numbers of those rows.
        num_logprobs: per row, how many log probabilities its request asked for (-1: all, None: none).
        max_logprobs: the most that any row asked for; None when no row did.
        jobs: logits processors with the rows they are for, in order.
        errors: rows that were refused before sampling, with the reason.
    """

    num_rows: int
    random: RandomRows | None = None
    uniforms: Tensor | None = None
    penalties: Penalties | None = None
    jobs: tuple[Job, ...] = ()
    num_logprobs: tuple[int | None, ...] = ()
    max_logprobs: int | None = None
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token of the untouched logits is all that any row asks for."""
        return self.random is None and self.penalties is None and self.max_logprobs is None and not (
            self.jobs or self.errors)


def take_rows(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows `index` of x as a copy, or x itself for None."""
    return x if index is None else x.index_select(0, index)


def put_rows(x: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """x with `rows` in the places that `take_rows` took them from; overwrites x."""
    return rows if index is None else x.index_copy_(0, index, rows)


def row_mask(rows: dict[int, str], num_rows: int) -> Tensor:
    """Bool [num_rows] on the host, True at the keys of `rows`."""
    mask = torch.zeros(num_rows, dtype=torch.bool)
    mask[list(rows)] = True
    return mask
