"""A checkpoint's tokenizer: text to token ids and back, special tokens, chat."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ...plugins.errors import CheckpointError, RequestError
from .chat_template import ChatRenderer, read_chat_templates

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Formats that transformers turns into a tokenizers.Tokenizer when a folder has no tokenizer.json.
CONVERTIBLE = ("tokenizer.model", "vocab.json", "tekken.json", "vocab.txt", "spiece.model")


class Tokenizer:
    """Wraps the `tokenizers` library; made by `from_folder`. Safe to use from several threads.

    Attributes:
        backend: the library's tokenizer, without truncation and padding.
        special_ids: ids that `skip_special_tokens` leaves out of decoded text.
        added_tokens: text of every token that was added to the vocabulary, special or not, by id.
        eos_token_id, bos_token_id: from tokenizer_config.json; None when it names none.
        vocab_size: number of tokens, added ones included. max_token_id: the largest id; ids may have gaps.
    """

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend, config = backend, config or {}
        backend.no_truncation()
        backend.no_padding()
        named = {name: text for name, value in config.items()
                 if name.endswith("_token") and (text := _token_content(value)) is not None}
        self._mark_special([*named.values(), *_extra_special_tokens(config)])
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_tokens = {i: token.content for i, token in added.items()}
        self.bos_token_id = self._id_of(named.get("bos_token"))
        self.eos_token_id = self._id_of(named.get("eos_token"))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.max_token_id = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._chat = ChatRenderer(chat_templates or {}, named)
        self._bos_change = self._bos_correction(config.get("add_bos_token"))
        self._anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
        self._token_texts: dict[int, str] = {}
        self._token_bytes: dict[int, bytes] = {}
        steps = _decoder_steps(backend)
        self._byte_letters = _byte_letters() if "ByteLevel" in steps else None
        self._has_byte_tokens = "ByteFallback" in steps

    @classmethod
    def from_folder(cls, folder: Path, *, chat_template: str | None = None) -> Tokenizer:
        """Read a checkpoint's tokenizer.

        Args:
            folder: holds tokenizer.json and usually tokenizer_config.json. Without tokenizer.json, older
                formats are converted by transformers.
            chat_template: text of a template that replaces the checkpoint's.

        Raises:
            CheckpointError: there is no tokenizer here, or it cannot be read.
        """
        config = _read_object(folder / "special_tokens_map.json")
        config.update(_read_object(folder / "tokenizer_config.json"))
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                backend = Backend.from_file(str(path))
            except Exception as error:  # the library raises plain Exception for whatever it cannot parse
                raise CheckpointError(f"{path} is not a tokenizer", found=error) from error
        else:
            backend, from_transformers = _convert(folder)
            config = {**from_transformers, **config}
        if chat_template is not None:
            return cls(backend, config, {"default": chat_template})
        return cls(backend, config, read_chat_templates(folder, config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. `add_special_tokens` adds what the checkpoint puts round it, as a rule bos.

        Special tokens written out in `text` become special tokens. Raises RequestError for a text that is not
        valid Unicode (a lone surrogate).
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("a text must be valid Unicode", param="prompt", found=type(text).__name__,
                               fix="leave out lone surrogates") from error
        if add_special_tokens and self._bos_change > 0:
            assert self.bos_token_id is not None
            return [self.bos_token_id, *ids]
        return ids[1:] if add_special_tokens and self._bos_change < 0 else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, all at once. Ids without a token read as nothing."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token reads as inside a text, with the space in front; U+FFFD for part of a character."""
        text = self._token_texts.get(token_id)
        if text is None:
            # Decoders strip the space of a text's first token, so the token is read behind another one.
            before = self.decode(self._anchor, skip_special_tokens=False)
            text = self.decode([*self._anchor, token_id], skip_special_tokens=False).removeprefix(before)
            if 0 <= token_id <= self.max_token_id:
                self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the UTF-8 of a text; of part of a character, the very bytes. b"" for no token."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._raw_bytes(token_id)
            if 0 <= token_id <= self.max_token_id:
                self._token_bytes[token_id] = found
        return found

    def _raw_bytes(self, token_id: int) -> bytes:
        piece = None if token_id in self.added_tokens or token_id < 0 else self.backend.id_to_token(token_id)
        if piece is not None and self._byte_letters is not None and self._byte_letters.keys() >= set(piece):
            return bytes(map(self._byte_letters.__getitem__, piece))
        if piece is not None and self._has_byte_tokens and (byte := BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return self.token_text(token_id).encode()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat.names)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation; `options` as `ChatRenderer.render` takes them."""
        return self._chat.render(messages, **options)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation: what `render_chat` writes, encoded with nothing added."""
        text = self._chat.render(messages, add_generation_prompt=add_generation_prompt,
                                 continue_final_message=continue_final_message, tools=tools, **kwargs)
        return self.encode(text, add_special_tokens=False)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _mark_special(self, tokens: Sequence[str]) -> None:
        """Make tokens that tokenizer_config.json names special so, where tokenizer.json holds plain ones.

        As transformers does, but a named token without an id is passed over: giving it one would put it outside
        the model's embedding.
        """
        added = self.backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        self.backend.add_special_tokens([
            AddedToken(token, special=True, normalized=False)
            for token in dict.fromkeys(tokens)
            if token not in special and self.backend.token_to_id(token) is not None
        ])

    def _bos_correction(self, wanted: Any) -> int:
        """1: add bos to what tokenizer.json gives, -1: take it off, 0: leave it.

        `add_bos_token` decides where it is set: DeepSeek-V2 asks for a bos that its tokenizer.json omits.
        """
        if not isinstance(wanted, bool) or self.bos_token_id is None:
            return 0
        present = self.backend.encode("").ids[:1] == [self.bos_token_id]
        return int(wanted) - int(present)


def _decoder_steps(backend: Backend) -> set[str]:
    """The kinds of decoder that a tokenizer runs its tokens through."""
    decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE (GPT-2) writes for each byte.

    Bytes that print in Latin-1 stand for themselves; the others have the letters from U+0100 on, in order.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printing = [ord(letter) for letter in letters if ord(letter) < 256]
    return dict(zip(letters, [*printing, *sorted(set(range(256)).difference(printing))]))


def _convert(folder: Path) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer of a folder without tokenizer.json, by transformers, and the special tokens it knows."""
    present = [name for name in CONVERTIBLE if (folder / name).is_file()]
    fix = "give a tokenizer's folder with --tokenizer, or serve token ids only with --skip-tokenizer-init"
    if not present:
        names = sorted(path.name for path in folder.iterdir())[:20] if folder.is_dir() else None
        raise CheckpointError(f"{folder} has no tokenizer", found=names and ", ".join(names),
                              known=["tokenizer.json", *CONVERTIBLE], fix=fix)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return tokenizer.backend_tokenizer, dict(tokenizer.special_tokens_map)
    except Exception as error:  # converters raise whatever the library behind them does
        raise CheckpointError(f"{folder}: cannot convert {present[0]} to a fast tokenizer", found=error,
                              fix=f"save tokenizer.json beside it with transformers, or {fix}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}", found=error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", found=type(value).__name__)
    return value


def _token_content(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json: a string, or an object with its properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key) or []
        values = values.values() if isinstance(values, dict) else values if isinstance(values, list) else []
        found.extend(text for value in values if (text := _token_content(value)) is not None)
    return found
