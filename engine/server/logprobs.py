"""Log probabilities in OpenAI's two shapes: parallel lists for completions, an object a token for chat."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ..request import Logprob, TokenLogprobs
from .protocol import ChatLogprobs, CompletionLogprobs, PromptLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

FLOOR = -9999.0
"""What minus infinity is written as: JSON has no word for it, and null would break clients."""


class TextOffsets:
    """Where the tokens of one text begin, in characters. All tokens of one character begin where it does."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if tokenizer is not None and skip_special_tokens else ()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0

    def prompt(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Offsets in a text that begins with an echoed prompt. What follows begins behind it.

        They are counted from its end: tokens may have a bos or a space in front that the text has not.
        """
        begins = self._advance(token_ids, ())
        ahead, self._end = self._end - len(text), len(text)
        return [max(0, begin - ahead) for begin in begins]

    def completion(self, token_ids: Sequence[int]) -> list[int]:
        return self._advance(token_ids, self._skipped)

    def _advance(self, token_ids: Sequence[int], skipped: Collection[int]) -> list[int]:
        begins = []
        for token_id in token_ids:
            begins.append(self._end)
            if self._tokenizer is not None and token_id not in skipped:
                self._end += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return begins


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    tokenizer: Tokenizer | None,
    text_offset: list[int],
) -> CompletionLogprobs:
    """For /v1/completions. `entries[i]` belongs to `token_ids[i]`; None is the first token of a prompt.

    A part of a character is written `bytes:\\xe4\\xb8`. Of tokens with one text the likelier keeps the key.
    """
    assert len(token_ids) == len(entries) == len(text_offset), "one entry per token"
    out = CompletionLogprobs(text_offset=text_offset, token_logprobs=[], tokens=[], top_logprobs=[])

    def name(token_id: int, logprob: Logprob | None) -> str:
        text, whole = token_text(token_id, logprob, tokenizer)
        return text if whole else f"bytes:{text}"

    for token_id, entry in zip(token_ids, entries):
        out.tokens.append(name(token_id, None if entry is None else entry[token_id]))
        out.token_logprobs.append(None if entry is None else max(entry[token_id].logprob, FLOOR))
        top: dict[str, float] | None = None if entry is None else {}
        for other, logprob in likeliest(entry):
            assert top is not None
            top.setdefault(name(other, logprob), max(logprob.logprob, FLOOR))
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


def token_text(token_id: int, logprob: Logprob | None, tokenizer: Tokenizer | None) -> tuple[str, bool]:
    """A token's text and True, or False with its bytes written out: a token may be part of a character."""
    if tokenizer is None:
        known = None if logprob is None else logprob.decoded_token
        return f"token_id:{token_id}" if known is None else known, True
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw), False


def _top_logprob(token_id: int, logprob: Logprob, tokenizer: Tokenizer | None) -> TopLogprob:
    text, _ = token_text(token_id, logprob, tokenizer)
    raw = text.encode() if tokenizer is None else tokenizer.token_bytes(token_id)
    return TopLogprob(token=text, logprob=max(logprob.logprob, FLOOR), bytes=list(raw))
