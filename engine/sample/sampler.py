"""Sampler: one token per row of logits. The order of its steps is vLLM's documented one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...csrc.sampling import apply_min_p, apply_penalties, apply_top_k_top_p, draw, likeliest
from .logprobs import LogprobTensors, token_logprobs
from .metadata import Penalties, SamplingMetadata, put_rows, row_mask, take_rows


@dataclass(frozen=True, kw_only=True)
class SamplerOutput:
    """What S rows of logits gave, on the logits' device.

    Attributes:
        token_ids: [S] int64.
        invalid: [S] bool, rows without a usable distribution: NaN, +inf, nothing but -inf before or after
            processing, or an entry in `errors`. Their token is 0 and must be ignored.
        logprobs: of the untouched logits; None when no row asked. Column 0 is the sampled token.
        errors: why a logits processor could not process a row, by row.
    """

    token_ids: Tensor
    invalid: Tensor
    logprobs: LogprobTensors | None
    errors: dict[int, str]


class Sampler:
    """Stateless. A row's token depends on its own logits, settings and random number alone, bit for bit."""

    def forward(self, logits: Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Sample from `logits` [S, V] of any floating dtype, which are left as they are.

        1. float32; 2. allowed tokens, bad words, min_tokens, logit_bias, plugin processors; 3. penalties;
        4. the likeliest token, which is the answer of greedy rows; 5. for the others: temperature, min_p,
        top_k, top_p, draw; 6. log probabilities of the logits as they came. Nothing waits for the device.
        """
        assert len(logits) == metadata.num_rows, f"{len(logits)} rows of logits, not {metadata.num_rows}"
        edited = bool(metadata.jobs or metadata.penalties)
        work = logits.to(torch.float32, copy=edited)
        errors = dict(metadata.errors)
        for job in metadata.jobs:
            errors |= job.run(work)
        if metadata.penalties is not None:
            self._penalize(work, metadata.penalties)

        peak, tokens = likeliest(work)  # the maximum is finite exactly if the row can be sampled
        invalid = ~peak.isfinite()
        if edited:  # a mask may have hidden a NaN
            invalid |= ~logits.amax(dim=-1).isfinite()
        if errors:
            invalid |= row_mask(errors, len(logits)).to(logits.device, non_blocking=True)
        if metadata.random is not None:
            tokens = self._sample(work, peak, tokens, invalid, metadata)
        tokens = tokens.masked_fill(invalid, 0)
        logprobs = None
        if metadata.max_logprobs is not None:
            logprobs = token_logprobs(logits, tokens, metadata.max_logprobs)
        return SamplerOutput(token_ids=tokens, invalid=invalid, logprobs=logprobs, errors=errors)

    __call__ = forward

    @staticmethod
    def _penalize(work: Tensor, rows: Penalties) -> None:
        penalized = apply_penalties(
            take_rows(work, rows.index),
            prompt_mask=take_rows(rows.prompt_mask, rows.state_rows),
            output_counts=take_rows(rows.output_counts, rows.state_rows),
            repetition=rows.repetition, presence=rows.presence, frequency=rows.frequency,
        )
        put_rows(work, rows.index, penalized)

    @staticmethod
    def _sample(work: Tensor, peak: Tensor, tokens: Tensor, invalid: Tensor,
                metadata: SamplingMetadata) -> Tensor:
        rows, numbers = metadata.random, metadata.uniforms
        assert rows is not None and numbers is not None
        # With the peak at 0 no temperature can overflow upwards; an unusable row becomes a harmless flat one.
        x = take_rows(work, rows.index) - take_rows(peak, rows.index)[:, None]
        x = x.div_(rows.temperature[:, None]).masked_fill_(take_rows(invalid, rows.index)[:, None], 0.0)
        if rows.min_p is not None:
            x = apply_min_p(x, rows.min_p)
        if rows.top is not None:
            top = rows.top
            kept = apply_top_k_top_p(take_rows(x, top.index), top.top_k, top.top_p, max_k=top.max_k)
            x = put_rows(x, top.index, kept)
        return put_rows(tokens, rows.index, draw(x.softmax(dim=-1), numbers))
