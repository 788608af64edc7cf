"""POST /tokenize and /detokenize, with vLLM's schema."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from .api import Api, json_response
from .body import read_json
from .chat import render
from .errors import refused
from .generation import encode
from .protocol import DetokenizeRequest, TokenizeRequest, TokenizeResponse


async def tokenize(api: Api, request: Request) -> Response:
    asked, headers = await read_json(
        request, TokenizeRequest, api.limits, {"chat_template": (), "tools": ([],)}
    )
    api.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise refused("give either prompt or messages", "prompt")
    if asked.prompt is not None:
        [tokens] = await encode(api, [asked.prompt], add_special_tokens=asked.add_special_tokens)
    else:
        tokens = await render(api, asked, asked.messages or [])
    strings = None
    if asked.return_token_strs:
        strings = await asyncio.to_thread(lambda: [api.tokenizer().token_text(token) for token in tokens])
    return json_response(
        TokenizeResponse(
            count=len(tokens),
            max_model_len=api.engine.config.model.max_model_len,
            tokens=tokens,
            token_strs=strings,
        ),
        headers,
    )


async def detokenize(api: Api, request: Request) -> Response:
    asked, headers = await read_json(request, DetokenizeRequest, api.limits, {})
    api.check_model(asked.model)
    vocabulary = api.engine.config.model.vocab_size
    for i, token in enumerate(asked.tokens):
        if token >= vocabulary:
            raise refused(f"token {token} is outside the vocabulary of {vocabulary}", f"tokens[{i}]")
    text = await asyncio.to_thread(api.tokenizer().decode, asked.tokens, skip_special_tokens=False)
    return json_response({"prompt": text}, headers)
