"""Log probabilities in OpenAI's two shapes: parallel lists for completions, an object a token for chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..request import Logprob, TokenLogprobs
from .protocol import ChatLogprobs, CompletionLogprobs, PromptLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

FLOOR = -9999.0
"""What minus infinity is written as: JSON has no word for it, and null would break clients."""


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    tokenizer: Tokenizer | None,
    text_offset: int,
) -> CompletionLogprobs:
    """For /v1/completions. `entries[i]` belongs to `token_ids[i]`; None is the first token of a prompt.

    `text_offset` is where the first token's text begins. Of tokens with one text the likelier keeps the key.
    """
    assert len(token_ids) == len(entries), "one entry per token"
    out = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, entry in zip(token_ids, entries):
        text = token_text(token_id, None if entry is None else entry[token_id], tokenizer)
        out.tokens.append(text)
        out.text_offset.append(text_offset)
        text_offset += len(text)
        out.token_logprobs.append(None if entry is None else max(entry[token_id].logprob, FLOOR))
        top: dict[str, float] | None = None if entry is None else {}
        for other, logprob in likeliest(entry):
            assert top is not None
            top.setdefault(token_text(other, logprob, tokenizer), max(logprob.logprob, FLOOR))
        out.top_logprobs.append(top)
    return out


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None, top: int
) -> ChatLogprobs:
    """For /v1/chat/completions, with the `top` likeliest tokens beside each (-1: all there are)."""
    content = []
    for token_id, entry in zip(token_ids, entries):
        ranked = likeliest(entry)[: None if top == -1 else top]
        chosen = _top_logprob(token_id, entry[token_id], tokenizer)
        content.append(
            TokenLogprob(
                token=chosen.token,
                logprob=chosen.logprob,
                bytes=chosen.bytes,
                top_logprobs=[_top_logprob(other, logprob, tokenizer) for other, logprob in ranked],
            )
        )
    return ChatLogprobs(content=content)


def finite(entries: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """Engine entries with minus infinity replaced by FLOOR, for `prompt_logprobs` in a response."""
    return [
        None
        if entry is None
        else {
            token: Logprob(max(logprob.logprob, FLOOR), logprob.rank, logprob.decoded_token)
            for token, logprob in entry.items()
        }
        for entry in entries
    ]


def likeliest(entry: TokenLogprobs | None) -> list[tuple[int, Logprob]]:
    """Tokens of an entry, likeliest first. The sampled one is among them even when it was unlikely."""
    return sorted((entry or {}).items(), key=lambda item: -item[1].logprob)


def token_text(token_id: int, logprob: Logprob | None, tokenizer: Tokenizer | None) -> str:
    if logprob is not None and logprob.decoded_token is not None:
        return logprob.decoded_token
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _top_logprob(token_id: int, logprob: Logprob, tokenizer: Tokenizer | None) -> TopLogprob:
    text = token_text(token_id, logprob, tokenizer)
    return TopLogprob(token=text, logprob=max(logprob.logprob, FLOOR), bytes=list(text.encode()))
