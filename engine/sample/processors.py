"""Logits processors: the protocol of plugins, the built-ins that use it, and a Job that contains failures.

A plugin names its class in the `nybble_logits_processors` hook; `--logits-processors NAME` switches it on:

    class NoRepeat:
        def __init__(self, vocab_size, device): ...

        def needs(self, params):                     # once per request; check params.extra_args here
            return bool(params.extra_args and params.extra_args.get("no_repeat"))

        def apply(self, logits, rows):               # once per step, with the rows that need it and no others
            for i, row in enumerate(rows):
                if len(row.output_ids):
                    logits[i, row.output_ids[-1]] = float("-inf")
            return logits

If `apply` raises, it is called again for each row alone, so that only the requests at fault end, each with
its error's text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..request import SamplingParams

NEG_INF = float("-inf")


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device, without waiting for it. The array must not change afterwards."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowView:
    """What a processor sees of one request. The arrays are views that hold only during the call.

    Attributes:
        prompt_ids, output_ids: int32 tokens of the prompt and generated so far.
        stop_token_ids: every id that ends the text, end-of-sequence ids among them.
        memo: what the processor worked out about the request and wants to keep; empty at first, gone when the
            request ends or is preempted. A step may be run twice, so count tokens in `output_ids`, not calls.
    """

    params: SamplingParams
    prompt_ids: npt.NDArray[np.int32]
    output_ids: npt.NDArray[np.int32]
    stop_token_ids: Sequence[int]
    bad_words_token_ids: Sequence[Sequence[int]]
    memo: dict[str, Any]


@runtime_checkable
class LogitsProcessor(Protocol):
    """Changes logits between the model and the sampler. Built once per worker, shared by all requests."""

    def __init__(self, vocab_size: int, device: torch.device) -> None: ...

    def needs(self, params: SamplingParams) -> bool:
        """Whether requests with these params are to be processed. Raises RequestError on bad `extra_args`."""

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        """[R, V] float32 logits of `rows`, free to be overwritten -> the same shape. Rows are independent."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One processor's work in one step: `positions` in the logits, `index` the same on the device."""

    processor: LogitsProcessor
    positions: tuple[int, ...]
    index: Tensor
    rows: tuple[RowView, ...] = ()

    def run(self, logits: Tensor) -> dict[int, str]:
        """Write the processed rows into `logits` [S, V]; returns what went wrong, by row of the logits."""
        try:
            taken = logits.index_select(0, self.index)
            result = self.processor.apply(taken, self.rows)
            if result.shape != taken.shape or result.dtype != taken.dtype:
                raise TypeError(f"apply returned {result.dtype} {list(result.shape)}, "
                                f"not {taken.dtype} {list(taken.shape)}")
            logits.index_copy_(0, self.index, result)
        except Exception as error:  # a plugin's code may raise anything
            if len(self.rows) == 1:
                return {self.positions[0]: explain(self.processor, error)}
            alone = (self._only(i).run(logits) for i in range(len(self.rows)))
            return {position: text for errors in alone for position, text in errors.items()}
        return {}

    def _only(self, i: int) -> Job:
        return replace(self, positions=self.positions[i : i + 1], index=self.index[i : i + 1],
                       rows=self.rows[i : i + 1])


def explain(processor: LogitsProcessor, error: Exception) -> str:
    """The text that a request ends with when a processor failed on it; the traceback goes to the log."""
    name = type(processor).__name__
    logging.getLogger(__name__).warning("logits processor %s failed", name, exc_info=error)
    return f"logits processor {name} failed: {type(error).__name__}: {error}"


class _Builtin:
    """Base of the built-ins: a token id is checked against the vocabulary before it becomes an index."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device

    def known(self, token_ids: Iterable[int]) -> npt.NDArray[np.int64]:
        """The ids that are in the vocabulary; an id beyond it would be written to another row."""
        ids = np.fromiter(token_ids, dtype=np.int64)
        return ids[(ids >= 0) & (ids < self.vocab_size)]

    def ban(self, logits: Tensor, banned: Sequence[Iterable[int]]) -> Tensor:
        """Mask the tokens `banned[i]` of row i."""
        ids = [self.known(tokens) for tokens in banned]
        rows = np.repeat(np.arange(len(ids)), [len(tokens) for tokens in ids])
        pairs = upload(np.stack((rows, np.concatenate(ids))), self.device)
        # Not `logits[...] = NEG_INF`: on CUDA a host scalar makes an indexed write wait for the device.
        return logits.index_put_((pairs[0], pairs[1]), logits.new_full((), NEG_INF))


class AllowedTokens(_Builtin):
    """allowed_token_ids: everything else is masked."""

    def needs(self, params: SamplingParams) -> bool:
        return params.allowed_token_ids is not None

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        return logits.masked_fill_(torch.stack([self._forbidden(row) for row in rows]), NEG_INF)

    def _forbidden(self, row: RowView) -> Tensor:
        if "forbidden" not in row.memo:
            mask = np.ones(self.vocab_size, dtype=np.bool_)
            mask[self.known(row.params.allowed_token_ids or ())] = False
            row.memo["forbidden"] = upload(mask, self.device)
        return row.memo["forbidden"]


class BadWords(_Builtin):
    """bad_words: a word's last token is masked while the output (not the prompt) ends with its others."""

    def needs(self, params: SamplingParams) -> bool:
        return bool(params.bad_words)

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        return self.ban(logits, [self._next(row) for row in rows])

    @staticmethod
    def _next(row: RowView) -> list[int]:
        words = [list(word) for word in row.bad_words_token_ids if word]
        longest = max((len(word) for word in words), default=0)
        tail = row.output_ids[-longest:].tolist()
        return [last for *start, last in words if tail[len(tail) - len(start) :] == start]


class MinTokens(_Builtin):
    """min_tokens: nothing that ends the text before that many tokens."""

    def needs(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        return self.ban(logits, [row.stop_token_ids if len(row.output_ids) < row.params.min_tokens else ()
                                 for row in rows])


class LogitBias(_Builtin):
    """logit_bias: added to the logits of its tokens."""

    def needs(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        for i, row in enumerate(rows):
            logits[i].index_add_(0, *self._bias(row))
        return logits

    def _bias(self, row: RowView) -> tuple[Tensor, Tensor]:
        if "bias" not in row.memo:
            bias = row.params.logit_bias or {}
            ids = self.known(bias)
            values = np.array([bias[int(token)] for token in ids], dtype=np.float32)
            row.memo["bias"] = upload(ids, self.device), upload(values, self.device)
        return row.memo["bias"]


def builtin_processors(vocab_size: int, device: torch.device) -> tuple[LogitsProcessor, ...]:
    """The built-ins in the order they run, before any plugin's."""
    return tuple(kind(vocab_size, device) for kind in (AllowedTokens, BadWords, MinTokens, LogitBias))
