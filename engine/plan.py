"""Plan and Result: the two messages between the scheduler and its workers, and the layout both agree on."""

from __future__ import annotations

import math

import msgspec

from .request import SamplingParams, TokenLogprobLists

BlockIds = tuple[list[int], ...]
"""Block numbers of a request, one list per KV-cache group."""


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request the workers do not hold: new, or resumed after preemption (then with its outputs so far).

    `stop_token_ids` are all ids that end its text, end-of-sequence among them: what `min_tokens` holds back.
    `token_ids` are prompt and outputs; `num_prompt_tokens` says where the prompt ends. `block_ids` replace whatever a
    worker may still know of the request.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: BlockIds
    params: SamplingParams
    seed: int
    stop_token_ids: list[int]
    bad_words_token_ids: list[list[int]]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One step, as columns: request `request_ids[i]` computes `num_tokens[i]` tokens from `num_computed[i]` on.

    All a worker ever hears. `new_block_ids` only has requests that gained blocks; `draft_token_ids` only requests with
    drafts. `finished_request_ids` are forgotten before anything else; a preempted request is among them.
    """

    step: int
    request_ids: list[str]
    num_tokens: list[int]
    num_computed: list[int]
    new_requests: list[NewRequest] = []
    new_block_ids: dict[str, BlockIds] = {}
    draft_token_ids: dict[str, list[int]] = {}
    finished_request_ids: list[str] = []

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens)


class Result(msgspec.Struct, kw_only=True):
    """What a step produced, by request id; a chunk that did not reach the end of its request has no entry.

    `errors` are requests whose logits were unusable: they have no token and must end.
    """

    sampled: dict[str, list[int]] = {}
    logprobs: dict[str, TokenLogprobLists] = {}
    prompt_logprobs: dict[str, TokenLogprobLists] = {}
    errors: dict[str, str] = {}
    draft_token_ids: dict[str, list[int]] = {}


class KVCacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one attention layer keeps per token: `shape` = (planes, heads, width) values of `dtype_bytes` each.

    K and V of every KV head are two planes; a latent that both are made of is one plane of one head.
    """

    shape: tuple[int, int, int]
    dtype_bytes: int

    def bytes_per_block(self, block_size: int) -> int:
        return math.prod(self.shape) * self.dtype_bytes * block_size


class KVCacheGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that share block numbers."""

    layers: list[int]
    spec: KVCacheSpec


class KVCacheLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The pool the workers allocated: every group has `num_blocks` blocks of `block_size` tokens; block 0 is null.

    A block number is handed out to one group at a time, so groups share the pool's capacity.
    """

    num_blocks: int
    block_size: int
    groups: list[KVCacheGroup]

    @property
    def max_tokens(self) -> int:
        """Most tokens one request can hold: the null block is nobody's."""
        return (self.num_blocks - 1) // len(self.groups) * self.block_size
