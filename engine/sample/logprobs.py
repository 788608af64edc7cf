"""Log probabilities of chosen tokens and of the likeliest ones, and their one-transfer way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..request import TokenLogprobLists


@dataclass(frozen=True, kw_only=True)
class LogprobTensors:
    """Log probabilities of S positions: column 0 is the actual token, the next k the likeliest, best first.

    `token_ids` [S, k+1] int64, `logprobs` [S, k+1] float32, `ranks` [S] int64: 1 + how many tokens are
    likelier than the actual one. The actual token may appear twice in a row.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor


def token_logprobs(logits: Tensor, actual_ids: Tensor, k: int) -> LogprobTensors:
    """Log softmax of `logits` [S, V] in float32, at `actual_ids` [S] and the k likeliest tokens (-1: all V).

    Equal log probabilities are listed by lowest index, so a shorter list is a prefix of a longer one.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    vocab = logprobs.shape[-1]
    actual_ids = actual_ids[:, None].long().clamp(0, vocab - 1)
    actual = logprobs.gather(1, actual_ids)
    ranks = (logprobs > actual).sum(dim=-1) + 1
    top_ids = _likeliest(logprobs, vocab if k < 0 else min(k, vocab))
    return LogprobTensors(
        token_ids=torch.cat((actual_ids, top_ids), dim=1),
        logprobs=torch.cat((actual, logprobs.gather(1, top_ids)), dim=1),
        ranks=ranks,
    )


def _likeliest(values: Tensor, k: int) -> Tensor:
    """Ids [S, k] of the k largest float32 values of each row, largest first, ties by lowest index.

    topk leaves ties in any order, so it is given keys without ties: the float's bits, ordered as a signed
    integer, above the index counted from the end.
    """
    if k == 0:
        return torch.empty(len(values), 0, dtype=torch.int64, device=values.device)
    vocab = values.shape[-1]
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    from_end = torch.arange(vocab - 1, -1, -1, device=values.device)
    keys = (ordered.long() << 32) | from_end
    return vocab - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def to_lists(tensors: LogprobTensors, per_row_k: Sequence[int | None]) -> list[TokenLogprobLists | None]:
    """One single-position message per row, cut to the k its request asked for; None where it asked for none.

    Reads the device once. k = -1 keeps the whole row.
    """
    width = tensors.token_ids.shape[1]
    ids, ranks = tensors.token_ids.to(torch.int32), tensors.ranks.to(torch.int32)
    packed = torch.cat((ids, tensors.logprobs.view(torch.int32), ranks[:, None]), dim=1).cpu()
    token_ids, logprobs = packed[:, :width], packed[:, width:-1].view(torch.float32)
    messages: list[TokenLogprobLists | None] = []
    for row, k in enumerate(per_row_k):
        if k is None:
            messages.append(None)
            continue
        end = width if k < 0 else k + 1
        messages.append(TokenLogprobLists(
            [token_ids[row, :end].tolist()], [logprobs[row, :end].tolist()], [int(packed[row, -1])]
        ))
    return messages
