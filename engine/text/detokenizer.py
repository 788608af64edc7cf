"""Tokens to text as they come: no character is split, no text taken back, and stop strings end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers.decoders import DecodeStream

from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_CONTEXT_TOKENS = 8
MAX_HELD_TOKENS = 16
MAX_CHARACTER_TOKENS = 3
INVALID_PREFIX = "Invalid prefix encountered"


class Detokenizer:
    """Decodes one completion token by token; `push` returns the text that became certain, `flush` the rest.

    The texts joined are what decoding prompt and completion at once adds to the prompt's text. They differ in
    one case: a byte-fallback vocabulary turns a whole run of byte tokens into U+FFFD when one of them is bad,
    while characters that were finished before the bad one are kept here, since they may have been sent.

    Args:
        prompt_token_ids: what comes before. Decoders strip the space of a text's first token, and an
            unfinished character at the end of the prompt is finished by the completion.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: False joins added tokens that follow each other without the space some
            decoders put there. Without effect when they are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._joins = not (skip_special_tokens or spaces_between_special_tokens)
        self._last_was_added = False
        self._held: list[int] = []
        context, unfinished = self._prompt_end(prompt_token_ids)
        self._stream, self._sent = DecodeStream(ids=context), context
        for token in unfinished:
            self._next(token)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; "" while a character is unfinished."""
        return "".join([self._next(token) for token in token_ids if token not in self._skipped])

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that nobody finished. Ends the completion."""
        held, self._held = self._held, []
        before = self._decode(self._sent)
        whole = self._decode([*self._sent, *held])  # a decoder may put a space between the two
        return whole[len(before):] if whole.startswith(before) else self._decode(held)

    def _next(self, token: int) -> str:
        self._held.append(token)
        text = self._step(token)
        if text is None:
            if len(self._held) < MAX_HELD_TOKENS:
                return ""
            text = self._release()
        else:
            self._sent, self._held = self._held, []
        if self._joins:
            added = self._tokenizer.added_tokens.get(token)
            if added is not None and self._last_was_added:
                text = added
            self._last_was_added = added is not None
        return text

    def _step(self, token: int) -> str | None:
        try:
            return self._stream.step(self._backend, token)
        except Exception as error:  # the library has no class of its own for this one
            if not str(error).startswith(INVALID_PREFIX):
                raise
        # The new token changed how sent text decodes: a bad byte after good ones (vLLM issue 17448). What was
        # sent stays; what was held starts anew.
        self._stream = DecodeStream(ids=self._held)
        return self._decode(self._held)

    def _release(self) -> str:
        """Give out held tokens, up to an unfinished character at their end.

        Bytes that are no characters would otherwise be held for ever, and decoded anew at each step.
        """
        whole, count = self._decode(self._held), len(self._held)
        for cut in range(count - 1, count - 1 - MAX_CHARACTER_TOKENS, -1):
            done, rest = self._held[:cut], self._held[cut:]
            if (text := self._decode(done)) + self._decode(rest) == whole:
                break
        else:
            text, done, rest = whole, self._held, []
        self._stream, self._sent, self._held = DecodeStream(), done, rest
        for token in rest:
            self._stream.step(self._backend, token)
        return text

    def _prompt_end(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """The last prompt tokens that read as text, and behind them those of an unfinished character."""
        ids: list[int] = []
        for token in reversed(prompt):
            if token not in self._skipped:
                ids.insert(0, token)
                if len(ids) == MAX_CONTEXT_TOKENS:
                    break
        for unfinished in range(MAX_CHARACTER_TOKENS + 1):
            end = len(ids) - unfinished
            for start in range(end - 1, -1, -1):
                text = self._decode(ids[start:end])
                if text and REPLACEMENT not in text:
                    return ids[start:end], ids[end:]
        return [], []

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class StopMatch(NamedTuple):
    """A stop string and the length that the text is cut to."""

    stop: str
    end: int


class StopStrings:
    """Finds the stop string that is complete first.

    Attributes:
        hold_back: how many characters at a text's end may still become a stop string and must not be sent.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops, self._include = stops, include_in_output
        self.hold_back = 0 if include_in_output else max(map(len, stops)) - 1

    def find(self, text: str, checked: int) -> StopMatch | None:
        """The match that ends first among those that end behind `text[:checked]`; a tie goes to the stop
        listed first.

        The result does not depend on how the text was cut into tokens.
        """
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, checked - len(stop) + 1))
            if start >= 0 and (best is None or start + len(stop) < best[0]):
                best = (start + len(stop), start, stop)
        if best is None:
            return None
        end, start, stop = best
        return StopMatch(stop, end if self._include else start)
