"""What a checkpoint's files mean: ids and prompts as in transformers, and refusals that say what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.engine.text.tokenizer import Tokenizer
from nybble.plugins.errors import CheckpointError, RequestError

TEXTS = ["the cat sat", " leading and  double ", "naïve 中文 😀", "<s>the<|user|> cat</s>", "", "\n\t x"]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve 中文?"},
        {"role": "assistant", "content": "so "}]
CHATML = """{{ bos_token }}{% for m in messages %}
  {{ '<|user|>' + m['role'] + '\n' + m['content'] | trim + eos_token }}
    {% if loop.last %}!{% endif %}
{% endfor %}{% if add_generation_prompt %}<|user|>assistant{% endif %}"""


def assert_like_transformers(folder: Path, *, chat: bool) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.vocab_size, ours.eos_token_id, ours.bos_token_id) == (
        len(theirs), theirs.eos_token_id, theirs.bos_token_id)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            decoded = theirs.decode(ids, skip_special_tokens=special)
            assert ours.decode(ids, skip_special_tokens=special) == decoded
    for n in (1, 2, 3) if chat else ():
        text = theirs.apply_chat_template(CHAT[:n], tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(CHAT[:n]) == text
        assert ours.apply_chat_template(CHAT[:n]) == theirs.apply_chat_template(
            CHAT[:n], add_generation_prompt=True, return_dict=False)
    if chat:
        assert ours.render_chat(CHAT, add_generation_prompt=False, continue_final_message=True) == (
            theirs.apply_chat_template(CHAT, tokenize=False, continue_final_message=True))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word"])
def test_folders_read_as_transformers_reads_them(tmp_path: Path, write_tokenizer, kind: str) -> None:
    assert_like_transformers(write_tokenizer(tmp_path, kind, chat_template=CHATML), chat=True)


def test_quantizers_fixtures_read_as_transformers_reads_them(shared_fixtures: Path) -> None:
    assert_like_transformers(shared_fixtures / "llama-bf16", chat=True)


def test_special_tokens_named_only_in_the_config(tmp_path: Path, write_tokenizer) -> None:
    """A plain token of tokenizer.json becomes special; one without an id gets none, nor an embedding."""
    folder = write_tokenizer(tmp_path, "word", additional_special_tokens=["mat", {"content": "on"}],
                             pad_token="[PAD]", eos_token={"content": "</s>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat the"
    assert tokenizer.backend.token_to_id("[PAD]") is None and tokenizer.eos_token_id == 2


@pytest.mark.parametrize(("in_json", "wanted", "expected"), [
    (False, None, False), (False, True, True), (True, None, True), (True, False, False), (True, True, True),
])
def test_add_bos_token(
    tmp_path: Path, write_tokenizer, in_json: bool, wanted: bool | None, expected: bool
) -> None:
    """DeepSeek-V2 says add_bos_token and has a tokenizer.json that adds none."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    write_tokenizer(tmp_path, **({} if wanted is None else {"add_bos_token": wanted}))
    if in_json:
        backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    bare = tokenizer.encode("<s>the", add_special_tokens=False)
    assert tokenizer.encode("<s>the") == ([1, *bare] if expected else bare)


def test_truncation_and_padding_of_tokenizer_json_are_switched_off(tmp_path: Path, write_tokenizer) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    backend.no_truncation()
    backend.no_padding()
    assert tokenizer.encode("def f(x): the cat") == backend.encode("def f(x): the cat").ids


def test_token_text_is_how_a_token_reads_inside_a_text(tokenizers: dict[str, Tokenizer]) -> None:
    by_name = {"byte_fallback": [("▁ab", " ab"), ("ab", "ab"), ("<0xE4>", "\ufffd"), ("<s>", "<s>")],
               "byte_level": [("Ġ", " "), ("a", "a"), ("</s>", "</s>")], "word": [("cat", " cat")]}
    for name, pairs in by_name.items():
        tokenizer = tokenizers[name]
        ids = [tokenizer.backend.token_to_id(token) for token, _ in pairs]
        assert [tokenizer.token_text(i) for i in ids] == [text for _, text in pairs]
        assert tokenizer.token_text(tokenizer.vocab_size + 100) == ""


def test_token_bytes_joined_are_the_text(tokenizers: dict[str, Tokenizer]) -> None:
    text = " naïve 中文 😀\n\x00Ġ"
    for name, space in (("byte_level", b""), ("byte_fallback", b" ")):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == space + text.encode()
    by_name = {"byte_level": [("Ã", b"\xc3"), ("Ġ", b" "), ("Ā", b"\0"), ("a", b"a"), ("</s>", b"</s>")],
               "byte_fallback": [("<0xE4>", b"\xe4"), ("<0x0A>", b"\n"), ("▁ab", b" ab"), ("<s>", b"<s>")],
               "word": [("cat", b" cat"), ("naïve", " naïve".encode())]}
    for name, pairs in by_name.items():
        tokenizer = tokenizers[name]
        for token, expected in pairs:
            assert tokenizer.token_bytes(tokenizer.backend.token_to_id(token)) == expected
        assert tokenizer.token_bytes(tokenizer.vocab_size + 100) == b""


@pytest.mark.parametrize(("files", "message"), [
    ({}, "has no tokenizer"),
    ({"config.json": "{}"}, "config.json"),
    ({"tokenizer.json": "{"}, "is not a tokenizer"),
    ({"tokenizer.json": None, "tokenizer_config.json": "[1]"}, "must hold a JSON object"),
    ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "cannot read"),
    ({"tokenizer.json": None, "tokenizer_config.json": '{"chat_template": [{"name": "a"}]}'}, "named texts"),
    ({"tokenizer.json": None, "chat_template.json": "{}"}, "has no chat_template"),
    ({"tokenizer.json": None, "chat_template.jinja": b"\xff"}, "cannot read"),
    ({"tokenizer.model": b"not sentencepiece"}, "cannot convert tokenizer.model"),
])
def test_refusals(
    tmp_path: Path, write_tokenizer, files: dict[str, str | bytes | None], message: str
) -> None:
    if "tokenizer.json" in files:
        write_tokenizer(tmp_path)
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in files or "--skip-tokenizer-init" in str(refusal.value)


def test_older_formats_come_through_transformers(tmp_path: Path, write_tokenizer) -> None:
    """GPT-2's vocab.json and merges.txt, without a tokenizer.json."""
    model = json.loads((write_tokenizer(tmp_path) / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}')
    assert_like_transformers(tmp_path, chat=False)
    assert Tokenizer.from_folder(tmp_path).eos_token_id == model["vocab"]["</s>"]


def test_a_text_that_is_not_unicode_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="valid Unicode"):
        byte_level.encode("lone \ud800 surrogate")


BOTH = {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize(("config", "files", "expected"), [
    ("config", {}, {"default": "config"}),
    ([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}], {}, BOTH),
    ("config", {"chat_template.json": '{"chat_template": "json"}'}, {"default": "json"}),
    ("config", {"chat_template.jinja": "jinja", "chat_template.json": "{}"}, {"default": "jinja"}),
    (None, {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"}, BOTH),
    (None, {"chat_templates/rag.jinja": "c"}, {"rag": "c"}),
    (None, {}, {}),
])
def test_where_templates_are_found(
    tmp_path: Path, write_tokenizer, config, files: dict[str, str], expected
) -> None:
    write_tokenizer(tmp_path, chat_template=config)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    tokenizer, own = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(tmp_path, chat_template="mine")
    assert tokenizer.has_chat_template == bool(expected)
    message, tools = [{"role": "user", "content": "x"}], [{"type": "function"}]
    assert own.render_chat(message) == own.render_chat(message, tools=tools) == "mine"
    if "default" in expected:
        assert tokenizer.render_chat(message) == expected["default"]
        assert tokenizer.render_chat(message, tools=tools) == expected.get("tool_use", expected["default"])
    else:
        with pytest.raises(RequestError, match="--chat-template FILE") as refusal:
            tokenizer.render_chat(message)
        assert refusal.value.code == "chat_template_missing" and (refusal.value.known or []) == list(expected)
