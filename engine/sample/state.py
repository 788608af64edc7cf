"""SamplingState: what each batch row samples with, kept between steps; makes one step's SamplingMetadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...csrc.sampling import stream_state, uniforms
from ..plan import NewRequest
from ..request import SamplingParams
from .metadata import Penalties, RandomRows, SamplingMetadata, TopKTopP
from .processors import Job, LogitsProcessor, RowView, builtin_processors, explain, upload

Ints = npt.NDArray[np.integer]

SETTINGS = np.dtype([
    ("rng", np.uint64),
    ("random", np.bool_),
    ("temperature", np.float32),
    ("min_p", np.float32),
    ("top_k", np.int64),
    ("top_p", np.float64),
    ("penalized", np.bool_),
    ("repetition", np.float32),
    ("presence", np.float32),
    ("frequency", np.float32),
])


@dataclass(frozen=True, kw_only=True)
class _Row:
    """The request of a batch row; `memos` has one entry per processor it needs, by the processor's place."""

    request: NewRequest
    memos: dict[int, dict[str, Any]]
    error: str | None

    def view(self, place: int, token_ids: npt.NDArray[np.int32], num_prompt: int) -> RowView:
        """What the processor at `place` sees of the request; `token_ids` are prompt and output."""
        request = self.request
        return RowView(
            params=request.params,
            prompt_ids=token_ids[:num_prompt],
            output_ids=token_ids[num_prompt:],
            stop_token_ids=request.stop_token_ids,
            bad_words_token_ids=request.bad_words_token_ids,
            memo=self.memos[place],
        )


@dataclass(frozen=True, kw_only=True)
class _Cached:
    """Metadata of the last set of rows without what changes every step, and where that comes from.

    `random_rows` and `rng` are the batch rows that draw and their generators; `places`: each job's processor.
    """

    version: int
    rows: Ints
    metadata: SamplingMetadata
    random_rows: Ints
    rng: npt.NDArray[np.uint64]
    places: tuple[int, ...]


class SamplingState:
    """Per-row sampling settings, parallel to the rows of the runner's InputBatch.

    Args:
        max_rows: rows of the batch.
        vocab_size: width V of the logits.
        device: where metadata tensors live.
        processors: plugin processors, run after the built-in ones in this order.
    """

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device,
                 processors: Sequence[LogitsProcessor] = ()) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._processors = (*builtin_processors(vocab_size, device), *processors)
        self._settings = np.zeros(max_rows, dtype=SETTINGS)
        self._rows: list[_Row | None] = [None] * max_rows
        self._counters: tuple[Tensor, Tensor] | None = None
        self._version = 0
        self._cached: _Cached | None = None

    def set_row(self, row: int, request: NewRequest) -> None:
        """Give a row to a request, new or resumed: its counters are rebuilt from `token_ids`.

        A processor that refuses the request does not raise here; `SamplerOutput.errors` will name the row.
        """
        params = request.params
        assert params.bad_words or not request.bad_words_token_ids, "bad_words_token_ids without bad_words"
        self._settings[row] = _settings_of(params, request.seed, self.vocab_size)
        self._rows[row] = self._start(request)
        self._version += 1
        if self._settings["penalized"][row]:
            counts, prompt = self._penalty_counters()
            tokens = np.asarray(request.token_ids, dtype=np.int64)
            split = request.num_prompt_tokens
            prompt[row] = upload(self._histogram(tokens[:split]) > 0, self.device)
            counts[row] = upload(self._histogram(tokens[split:]).astype(np.int32), self.device)

    def move_row(self, src: int, dst: int) -> None:
        """Move a request to another row, whose own is forgotten."""
        assert src != dst
        if self._settings["penalized"][src]:
            for counter in self._penalty_counters():
                counter[dst] = counter[src]
        self._settings[dst], self._rows[dst] = self._settings[src], self._rows[src]
        self.clear_row(src)

    def clear_row(self, row: int) -> None:
        """Forget a row's request."""
        self._settings[row] = np.zeros((), dtype=SETTINGS)
        self._rows[row] = None
        self._version += 1

    def observe(self, rows: Ints, token_ids: Ints) -> None:
        """Count sampled tokens: `token_ids[i]` went to batch row `rows[i]`; rows may repeat."""
        counted = self._settings["penalized"][rows] & (token_ids >= 0) & (token_ids < self.vocab_size)
        if counted.any():
            where = upload(np.stack((rows[counted], token_ids[counted])).astype(np.int64), self.device)
            counts, _ = self._penalty_counters()
            counts.index_put_((where[0], where[1]), counts.new_ones(()), accumulate=True)

    def metadata(self, rows: Ints, num_tokens: Ints, num_prompt: Ints,
                 token_ids: npt.NDArray[np.int32]) -> SamplingMetadata:
        """What the sampler needs for one step.

        Args:
            rows: [S] batch rows that sample, in the order of the logits' rows.
            num_tokens, num_prompt: [max_rows] tokens each row holds, and how many of them are prompt.
            token_ids: [max_rows, max_len] host buffer of prompt and output, valid up to `num_tokens`.
        """
        cached = self._cached
        if cached is None or cached.version != self._version or not np.array_equal(cached.rows, rows):
            cached = self._cached = self._build(rows)
        metadata = cached.metadata
        if metadata.random is None and not metadata.jobs:
            return metadata
        positions = num_tokens[cached.random_rows] - num_prompt[cached.random_rows]
        jobs = tuple(
            replace(job, rows=tuple(
                self._record(row).view(place, token_ids[row, : num_tokens[row]], num_prompt[row])
                for row in rows[list(job.positions)].tolist()
            ))
            for place, job in zip(cached.places, metadata.jobs)
        )
        return replace(metadata, jobs=jobs, uniforms=upload(uniforms(cached.rng, positions), self.device))

    def _start(self, request: NewRequest) -> _Row:
        memos: dict[int, dict[str, Any]] = {}
        for place, processor in enumerate(self._processors):
            try:
                if processor.needs(request.params):
                    memos[place] = {}
            except Exception as error:  # a plugin's code may raise anything; this one request ends for it
                return _Row(request=request, memos={}, error=explain(processor, error))
        return _Row(request=request, memos=memos, error=None)

    def _record(self, row: int) -> _Row:
        record = self._rows[row]
        assert record is not None, f"row {row} samples but holds no request"
        return record

    def _histogram(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        inside = tokens[(tokens >= 0) & (tokens < self.vocab_size)]
        return np.bincount(inside, minlength=self.vocab_size)

    def _penalty_counters(self) -> tuple[Tensor, Tensor]:
        """Output counts [max_rows, V] int32 and prompt mask [max_rows, V] bool, made when first needed."""
        if self._counters is None:
            shape = len(self._rows), self.vocab_size
            self._counters = (torch.zeros(shape, dtype=torch.int32, device=self.device),
                              torch.zeros(shape, dtype=torch.bool, device=self.device))
        return self._counters

    def _upload(self, array: npt.NDArray[np.generic]) -> Tensor:
        return upload(array.copy(), self.device)

    def _build(self, rows: Ints) -> _Cached:
        rows = rows.copy()
        settings = self._settings[rows]
        records = [self._record(row) for row in rows]
        logprobs = tuple(record.request.params.logprobs for record in records)
        asked = [self.vocab_size if k < 0 else k for k in logprobs if k is not None]
        random = np.flatnonzero(settings["random"])
        jobs = self._build_jobs(records)
        metadata = SamplingMetadata(
            num_rows=len(rows),
            random=self._build_random(settings, random),
            penalties=self._build_penalties(settings, rows),
            jobs=tuple(jobs.values()),
            num_logprobs=logprobs,
            max_logprobs=max(asked, default=None),
            errors={i: record.error for i, record in enumerate(records) if record.error is not None},
        )
        return _Cached(version=self._version, rows=rows, metadata=metadata, random_rows=rows[random],
                       rng=settings["rng"][random], places=tuple(jobs))

    def _build_random(self, settings: npt.NDArray[np.void], random: Ints) -> RandomRows | None:
        if not len(random):
            return None
        index = None if len(random) == len(settings) else self._upload(random)
        settings = settings[random]
        return RandomRows(
            index=index,
            temperature=self._upload(settings["temperature"]),
            min_p=self._upload(settings["min_p"]) if settings["min_p"].any() else None,
            top=self._build_top(settings),
        )

    def _build_top(self, settings: npt.NDArray[np.void]) -> TopKTopP | None:
        by_k, by_p = settings["top_k"] > 0, settings["top_p"] < 1.0
        cut = np.flatnonzero(by_k | by_p)
        if not len(cut):
            return None
        return TopKTopP(
            index=None if len(cut) == len(settings) else self._upload(cut),
            top_k=self._upload(settings["top_k"][cut]) if by_k.any() else None,
            top_p=self._upload(settings["top_p"][cut]) if by_p.any() else None,
            max_k=int(settings["top_k"].max()),
        )

    def _build_penalties(self, settings: npt.NDArray[np.void], rows: Ints) -> Penalties | None:
        index = np.flatnonzero(settings["penalized"])
        if not len(index):
            return None
        counts, prompt = self._penalty_counters()
        settings = settings[index]
        return Penalties(
            index=self._upload(index),
            state_rows=self._upload(rows[index].astype(np.int64)),
            output_counts=counts,
            prompt_mask=prompt,
            repetition=self._upload(settings["repetition"]),
            presence=self._upload(settings["presence"]),
            frequency=self._upload(settings["frequency"]),
        )

    def _build_jobs(self, records: Sequence[_Row]) -> dict[int, Job]:
        jobs = {}
        for place, processor in enumerate(self._processors):
            positions = tuple(i for i, record in enumerate(records) if place in record.memos)
            if positions:
                index = self._upload(np.array(positions, dtype=np.int64))
                jobs[place] = Job(processor=processor, positions=positions, index=index)
        return jobs


def _settings_of(params: SamplingParams, seed: int, vocab_size: int) -> npt.NDArray[np.void]:
    """One record of SETTINGS; what a greedy row does not use stays 0."""
    setting = np.zeros((), dtype=SETTINGS)
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    setting["penalized"] = penalties != (1.0, 0.0, 0.0)
    setting["repetition"], setting["presence"], setting["frequency"] = penalties
    if not params.is_greedy:
        setting["random"], setting["rng"] = True, stream_state(seed)
        for name in ("temperature", "min_p", "top_p"):
            setting[name] = getattr(params, name)
        setting["top_k"] = params.top_k if 0 < params.top_k < vocab_size else 0
    return setting
