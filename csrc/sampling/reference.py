"""Sampling in plain torch, without host syncs; each row's result is a function of that row alone.

That last promise is kept bit for bit. Sums whose order a library may change with the shape of the batch are
taken over integers: probabilities become fixed-point weights, and integers add up the same in any order.

Every op may overwrite `logits` and returns the result. A row without a finite maximum gives an unspecified
row, never an index out of range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")
MIN_TILE, MAX_TILE = 32, 256  # columns searched at a time; most vocabularies are multiples of 64

# A probability p becomes the integer p * 2**61: exact for float32 p >= 2**-38; a row sums to below 2**62.
FIXED_POINT = 2.0**61
DIGIT_BITS = 10
DIGITS = 3  # the bit pattern of a float32 in [0, 2) has 30 bits


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and its first index, [R] and [R] int64, of logits [R, V]; a NaN is the maximum.

    On CPU torch vectorizes the plain maximum but not the one with an index, so only the first tile of columns that
    holds the maximum is searched for it: 6 times as fast at [64, 32000].
    """
    width = math.gcd(logits.shape[-1], MAX_TILE)
    if logits.device.type != "cpu" or width < MIN_TILE:
        peak, token = logits.max(dim=-1)
        return peak, token
    tiles = logits.unflatten(-1, (-1, width))
    peak, tile = tiles.amax(dim=-1).max(dim=-1)
    inside = tiles.take_along_dim(tile[:, None, None], dim=1).squeeze(1).argmax(dim=-1)
    return peak, tile * width + inside


def apply_penalties(logits: Tensor, *, prompt_mask: Tensor, output_counts: Tensor, repetition: Tensor,
                    presence: Tensor, frequency: Tensor) -> Tensor:
    """Make seen tokens less (or more) likely.

    Args:
        logits: [R, V] float32.
        prompt_mask: [R, V] bool, tokens of the prompt.
        output_counts: [R, V] integer, how often each token was generated.
        repetition: [R]; divides a positive and multiplies a negative logit of any seen token (Keskar et al.,
            CTRL, 2019). 1 is off.
        presence, frequency: [R]; subtracted once, or once per occurrence, from generated tokens. 0 is off.
    """
    generated = output_counts > 0
    factor = torch.where(prompt_mask | generated, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    logits -= output_counts * frequency[:, None]
    logits -= generated * presence[:, None]
    return logits


def apply_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than `min_p` [R] times the likeliest (Nguyen et al. 2024). 0 is off."""
    probs = logits.softmax(dim=-1)
    floor = probs.amax(dim=-1, keepdim=True) * min_p[:, None]
    return logits.masked_fill_(probs < floor, NEG_INF)


def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None, *,
                      max_k: int | None = None) -> Tensor:
    """Keep the k likeliest tokens, then the nucleus of mass p of what is left; the rest becomes -inf.

    Args:
        logits: [R, V] float32.
        k: [R] integer or None. Below 1 or at least V is off. Tokens that tie with the k-th survive with it.
        p: [R] float or None. At least 1 is off. See `_nucleus`; one token is always kept.
        max_k: bound on the k that are on, known on the host; None costs a sort of every row.
    """
    vocab = logits.shape[-1]
    if k is not None:
        width = min(max_k or vocab, vocab)
        top = logits.topk(width, dim=-1).values
        kth = top.gather(1, (k[:, None].long() - 1).clamp(0, width - 1))
        off = (k < 1) | (k >= vocab)
        logits.masked_fill_(logits < kth.masked_fill_(off[:, None], NEG_INF), NEG_INF)
    if p is not None:
        logits.masked_fill_(~_nucleus(logits.softmax(dim=-1), p[:, None]), NEG_INF)
    return logits


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by inverse CDF in vocabulary order: [R, V] float32 and [R] float64 in [0, 1] -> [R] int64.

    A token of probability 0 is never drawn, nor is index V. Overwrites `probs`, which need not sum to 1.
    """
    mass = _fixed_point(probs).cumsum_(dim=-1)
    total = mass[:, -1:]
    target = torch.minimum((uniforms[:, None] * total.double()).long(), total - 1)
    token = torch.searchsorted(mass, target, right=True).squeeze(1)
    return token.clamp_(max=probs.shape[-1] - 1)


def _fixed_point(probs: Tensor) -> Tensor:
    return probs.mul_(FIXED_POINT).long()


def _nucleus(probs: Tensor, p: Tensor) -> Tensor:
    """Bool [R, V]: the smallest set of likeliest tokens with mass >= p (Holtzman et al. 2020).

    Of equally likely tokens the lowest index is kept first, as by a stable sort. But this is a radix select:
    the bit pattern of a non-negative float orders like the float, so the boundary is found digit by digit,
    from one histogram of mass per digit, at the same cost whatever the distribution.
    """
    key = probs.view(torch.int32).clone()
    weights = _fixed_point(probs)
    total = weights.sum(dim=-1, keepdim=True)
    wanted = torch.minimum((p * total.double()).ceil_().long().clamp_(min=1), total)
    spare = total - wanted  # mass that may be dropped, least likely first
    boundary, live = torch.zeros_like(spare, dtype=torch.int32), weights
    for digit in reversed(range(DIGITS)):
        shifted = key >> (digit * DIGIT_BITS)
        if digit < DIGITS - 1:
            live = weights * (shifted >> DIGIT_BITS == boundary)
        bucket, below, at = _bucket_holding(shifted & (2**DIGIT_BITS - 1), live, spare)
        spare = spare - below
        boundary = boundary << DIGIT_BITS | bucket.int()
    # The last bucket holds only tokens tied at the boundary: keep as many as the mass still wanted takes.
    each = _fixed_point(boundary.view(torch.float32).clone())
    tied = key == boundary
    kept_ties = tied.cumsum(dim=-1, dtype=torch.int32) <= -((spare - at) // each.clamp_(min=1))
    return (key > boundary.masked_fill_(p >= 1.0, -1)) | (tied & kept_ties)


def _bucket_holding(digits: Tensor, weights: Tensor, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first bucket where mass, summed from the least likely up, exceeds `spare`; mass below and in it."""
    mass = torch.zeros(len(digits), 2**DIGIT_BITS, dtype=torch.int64, device=digits.device)
    mass.scatter_add_(1, digits.long(), weights)
    upto = mass.cumsum(dim=-1)
    bucket = torch.searchsorted(upto, spare, right=True).clamp_(max=mass.shape[1] - 1)
    at = mass.gather(1, bucket)
    return bucket, upto.gather(1, bucket) - at, at
