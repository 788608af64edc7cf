"""Triton: a router's logits in float32, in parts of the inputs, and the choice of experts from their sum."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early

# Keys are float32 bits as integers of the same order: NaN above all, and below all what is nobody's.
NAN_KEY = tl.constexpr(0x7FFFFFFF)
NO_KEY = tl.constexpr(-0x80000000)


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    x_ptr, weight_ptr, out_ptr, T, E, H, x_row,
    PER_SPLIT: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [splits, T, E] float32, of which the sum is x [T, H] weight [E, H]^T: PER_SPLIT inputs each.

    Products of 16-bit values are exact, so this is float32's result; the order of the sum depends on H alone.
    """
    start_early(EARLY)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split, h = tl.program_id(2), tl.arange(0, BLOCK_H)
    x_at = x_ptr + t[:, None].to(tl.int64) * x_row + h[None, :]
    w_at = weight_ptr + e[None, :] * H + h[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, H), BLOCK_H):
        inside = first + h < H
        x = tl.load(x_at + first, mask=(t < T)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at + first, mask=(e < E)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    at = (split * T + t[:, None]).to(tl.int64) * E + e[None, :]
    tl.store(out_ptr + at, acc, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit
def _key(x):
    """Integers in the order of float32 x; zeros of both signs are equal, and so are all NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN_KEY, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _value(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _allowed(
    key, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, GROUPS: tl.constexpr, G_PAD: tl.constexpr, S_PAD: tl.constexpr,
):
    """[G_PAD] bool: the best groups of keys [G_PAD, S_PAD], by their best value or the sum of their best two."""
    g, s = tl.arange(0, G_PAD), tl.arange(0, S_PAD)
    worth = tl.max(key, axis=1)
    if TOP2:
        first = tl.min(tl.where(key == worth[:, None], s[None, :], S_PAD), axis=1)
        second = tl.max(tl.where(s[None, :] == first[:, None], NO_KEY, key), axis=1)
        worth = _key(_value(worth) + tl.where(second == NO_KEY, 0.0, _value(second)))
    worth = tl.where(g < GROUPS, worth, NO_KEY)
    allowed = g < 0
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.min(tl.where(worth == tl.max(worth, axis=0), g, G_PAD), axis=0)
        allowed = allowed | (g == best)
        worth = tl.where(g == best, NO_KEY, worth)
    return allowed


@triton.jit
def _scores(logits, exists, SOFTMAX: tl.constexpr):
    """Of each row of logits [R, P]; where nothing exists, 0 or less than any."""
    if not SOFTMAX:
        return 1.0 / (1.0 + tl.exp(-logits))
    logits = tl.where(exists, logits, float("-inf"))
    powers = tl.where(exists, tl.exp(logits - tl.max(logits, axis=1)[:, None]), 0.0)
    return tl.math.div_rn(powers, tl.broadcast_to(tl.sum(powers, axis=1)[:, None], logits.shape))


@triton.jit
def _best(
    weight_ptr, expert_ptr, t, T, key, scores, index, scale,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, TINY: tl.constexpr, K_PAD: tl.constexpr,
):
    """Store the TOP_K experts, by key [R, P], the lowest of equals first, of tokens t [R] and their weights."""
    j = tl.arange(0, K_PAD)[None, :]
    weights, experts = tl.zeros((key.shape[0], K_PAD), tl.float32), tl.zeros((key.shape[0], K_PAD), tl.int32)
    for round in tl.static_range(TOP_K):
        best = tl.max(key, axis=1)
        expert = tl.min(tl.where(key == best[:, None], index, 0x7FFFFFFF), axis=1)
        here = (index == expert[:, None]) & (key > NO_KEY)
        weight = tl.sum(tl.where(here, scores, 0.0), axis=1)
        weights = tl.where(j == round, weight[:, None], weights)
        experts = tl.where(j == round, expert[:, None], experts)
        key = tl.where(here, NO_KEY, key)
    if RENORMALIZE:
        total = tl.sum(weights, axis=1) + TINY
        weights = tl.math.div_rn(weights, tl.broadcast_to(total[:, None], weights.shape))
    at, inside = t[:, None].to(tl.int64) * TOP_K + j, (t < T)[:, None] & (j < TOP_K)
    tl.store(weight_ptr + at, weights * scale, mask=inside)
    tl.store(expert_ptr + at, experts.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logit_ptr, bias_ptr, weight_ptr, expert_ptr, T, scale,
    SPLITS: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, TINY: tl.constexpr,
    G_PAD: tl.constexpr, S_PAD: tl.constexpr, K_PAD: tl.constexpr, EARLY: tl.constexpr,
):
    """Program t: the experts [T, TOP_K] int64 of token t and their weights, from logits [SPLITS, T, E] float32; see
    `route`. The parts are added up in order.

    Experts are held in one row of G_PAD groups of S_PAD; without groups, or with all of them allowed, of one group.
    """
    start_early(EARLY)
    SIZE: tl.constexpr = E // GROUPS
    t = tl.program_id(0) + tl.arange(0, 1)
    at = tl.arange(0, G_PAD * S_PAD)[None, :]
    exists = (at // S_PAD < GROUPS) & (at % S_PAD < SIZE)
    index = at // S_PAD * SIZE + at % S_PAD
    logits = tl.zeros((1, G_PAD * S_PAD), tl.float32)
    for split in tl.static_range(SPLITS):
        logits += tl.load(logit_ptr + (split * T + t[:, None]).to(tl.int64) * E + index, mask=exists, other=0.0)
    scores = _scores(logits, exists, SOFTMAX)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + index, mask=exists, other=0.0).to(tl.float32)
    key = tl.where(exists, _key(choice), NO_KEY)
    if TOP_GROUPS < GROUPS:
        allowed = _allowed(tl.reshape(key, (G_PAD, S_PAD)), TOP_GROUPS, TOP2, GROUPS, G_PAD, S_PAD).to(tl.int32)
        allowed = tl.reshape(tl.broadcast_to(allowed[:, None], (G_PAD, S_PAD)), (1, G_PAD * S_PAD))
        lowest = _key(tl.full((1, G_PAD * S_PAD), float("-inf"), tl.float32))
        key = tl.where(exists & (allowed == 0), lowest, key)
    _best(weight_ptr, expert_ptr, t, T, key, scores, index, scale, TOP_K, RENORMALIZE, TINY, K_PAD)
