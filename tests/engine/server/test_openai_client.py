"""The real openai package against the server: what its types need is there."""

from __future__ import annotations

import asyncio

import pytest

openai = pytest.importorskip("openai", reason="the openai package is a dev dependency")

USER = [{"role": "user", "content": "Hi"}]


def test_models(server):
    client = server.openai()
    [model] = client.models.list().data
    assert (model.id, model.max_model_len, model.demo) == ("fake", 64, True)
    assert client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_chat(server):
    answer = server.openai().chat.completions.create(
        model="fake", messages=USER, max_completion_tokens=3, max_tokens=5
    )
    assert answer.choices[0].message.content == "Hel" and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        7,
        3,
        10,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_chat_logprobs(server):
    answer = server.openai().chat.completions.create(
        model="fake", messages=USER, logprobs=True, top_logprobs=2
    )
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("H", -0.5, [72])
    assert [top.token for top in first.top_logprobs] == ["H", "I"]
    bare = server.openai().chat.completions.create(model="fake", messages=USER, logprobs=True)
    assert bare.choices[0].logprobs.content[0].top_logprobs == []


def test_chat_stream_accumulates(server):
    with server.openai().chat.completions.stream(model="fake", messages=USER, n=2) as stream:
        final = stream.get_final_completion()
    assert [c.message.content for c in final.choices] == ["Hello!", "Hello!"]
    assert {c.finish_reason for c in final.choices} == {"stop"}


def test_completions_of_every_prompt_form(server):
    create = server.openai().completions.create
    for prompt, count in (("ab", 1), (["a", "b"], 2), ([97, 98], 1), ([[97], [98, 99]], 2)):
        answer = create(model="fake", prompt=prompt, n=2, echo=True)
        texts = [c.text for c in answer.choices]
        assert [c.index for c in answer.choices] == list(range(2 * count))
        assert texts[0] == texts[1] and texts[0].endswith("Hello!") and texts[0].startswith("a")


def test_scoring_a_prompt_as_lm_eval_does(server):
    for max_tokens, generated in ((1, "H"), (0, "")):
        answer = server.openai().completions.create(
            model="fake",
            prompt=[[97, 98, 99]],
            echo=True,
            logprobs=1,
            max_tokens=max_tokens,
            temperature=0,
            seed=1234,
        )
        choice = answer.choices[0]
        assert choice.text == "abc" + generated and choice.finish_reason == "length"
        assert choice.logprobs.tokens == list("abc" + generated)
        assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, *([-0.5] * len(generated))]
        assert choice.logprobs.top_logprobs[:2] == [None, {"b": -0.5}]
        assert answer.usage.completion_tokens == len(generated)
    assert server.engine.seen[-1]["params"].max_tokens == 1


def test_async_clients_run_side_by_side(serve):
    live = serve(delay=0.02)

    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="fake", messages=USER, stream=True)
        return "".join([chunk.choices[0].delta.content async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(16)))

    assert asyncio.run(main()) == ["Hello!"] * 16


def test_an_error_frame_raises(serve, dead):
    live = serve(at={2: dead})
    with pytest.raises(openai.APIError, match="engine stopped"):
        list(live.openai().completions.create(model="fake", prompt="x", stream=True))
    with pytest.raises(openai.InternalServerError) as caught:
        live.openai().completions.create(model="fake", prompt="x")
    assert caught.value.code == "engine_dead" and caught.value.status_code == 503


def test_api_key(serve):
    live = serve(args={"api_keys": ("sesame",)})
    assert live.openai(api_key="sesame").models.list().data
    with pytest.raises(openai.AuthenticationError) as caught:
        live.openai(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
