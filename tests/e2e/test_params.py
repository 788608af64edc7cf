"""SamplingParams through the whole engine: each field does what it says to the tokens a user gets."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import transformers

from nybble import LLM, SamplingParams
from nybble.plugins.errors import RequestError

PROMPT = list(range(10, 40))
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(llama):
    engine = LLM(str(llama), use_tqdm_on_load=False, num_gpu_blocks_override=200, max_logprobs=-1)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def plain(llm):
    return one(llm, GREEDY.replace(ignore_eos=True))


def one(llm, params, prompt=PROMPT):
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return output.outputs[0]


def test_eos_and_stop_ids_end_the_text(llm, plain):
    at = 5
    first = plain.token_ids.index(plain.token_ids[at])
    stopped = one(llm, GREEDY.replace(ignore_eos=True, stop_token_ids=[plain.token_ids[at]]))
    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", plain.token_ids[at])


def test_min_tokens_holds_back_eos_and_stop_ids(llm):
    """A bias makes end-of-sequence and a stop id the two likeliest tokens; neither may come before its time."""
    eager = GREEDY.replace(logit_bias={1: 100.0, 77: 70.0}, stop_token_ids=[77])
    assert one(llm, eager).token_ids == [1]
    held = one(llm, eager.replace(min_tokens=4))
    assert len(held.token_ids) == 5 and not {1, 77} & set(held.token_ids[:4]) and held.token_ids[4] == 1


def test_stop_string_cuts_text_and_frees_the_request(llm, plain):
    text = plain.text
    stop = text[4:6]
    cut = one(llm, GREEDY.replace(ignore_eos=True, stop=[stop]))
    assert cut.text == text[: text.index(stop)] and (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = one(llm, GREEDY.replace(ignore_eos=True, stop=stop, include_stop_str_in_output=True))
    assert kept.text == text[: text.index(stop) + len(stop)]
    assert not llm.llm_engine.has_unfinished_requests()


def test_masks_and_biases(llm, plain):
    assert set(one(llm, GREEDY.replace(allowed_token_ids=[50, 60, 70])).token_ids) <= {50, 60, 70}
    assert one(llm, GREEDY.replace(logit_bias={99: 100.0})).token_ids[0] == 99
    banned = plain.text[0]
    assert banned not in one(llm, GREEDY.replace(ignore_eos=True, bad_words=[banned])).text


def test_repetition_penalty_is_transformers(llm, llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                              repetition_penalty=1.4)[0, len(PROMPT):].tolist()
    assert one(llm, GREEDY.replace(ignore_eos=True, repetition_penalty=1.4)).token_ids == expected


def test_logprobs_are_transformers(llm, llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    (output,) = llm.generate([PROMPT], GREEDY.replace(ignore_eos=True, logprobs=3, prompt_logprobs=2), use_tqdm=False)
    completion = output.outputs[0]
    ids = PROMPT + completion.token_ids
    with torch.inference_mode():
        reference = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    entries = [*output.prompt_logprobs, *completion.logprobs]
    assert entries[0] is None and len(entries) == len(ids)
    for position, (entry, token) in enumerate(zip(entries[1:], ids[1:])):
        row = reference[position]
        assert next(iter(entry)) == token
        top = set(row.topk(3 if position >= len(PROMPT) - 1 else 2).indices.tolist())
        assert set(entry) == top | {token}
        for found, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[found].item(), abs=1e-4)
            assert logprob.rank == 1 + (row > row[found]).sum().item()
    assert completion.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids)))


def test_minus_one_is_the_whole_vocabulary(llm):
    (output,) = llm.generate([PROMPT], GREEDY.replace(logprobs=-1, prompt_logprobs=-1, max_tokens=2), use_tqdm=False)
    for entry in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
        assert len(entry) == 300 and sum(torch.tensor([v.logprob for v in entry.values()]).exp()) == pytest.approx(1)


def test_prompt_logprobs_survive_chunks_and_the_prefix_cache(llama, llm):
    params = GREEDY.replace(prompt_logprobs=1, max_tokens=3)
    whole = llm.generate([PROMPT], params, use_tqdm=False)[0].prompt_logprobs
    small = LLM(str(llama), use_tqdm_on_load=False, num_gpu_blocks_override=50, max_num_batched_tokens=7,
                max_num_seqs=4)
    for _ in range(2):
        again = small.generate([PROMPT], params, use_tqdm=False)[0].prompt_logprobs
        assert [list(e or ()) for e in again] == [list(e or ()) for e in whole]
    small.shutdown()


@pytest.mark.parametrize("prompt", ["abc", {"prompt": "abc"}, {"prompt_token_ids": [102, 103, 104]}, [102, 103, 104]],
                         ids=str)
def test_every_form_of_prompt(llm, prompt):
    (alone,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    both = llm.generate([prompt, prompt], GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in both] == [alone.outputs[0].token_ids] * 2
    assert alone.prompt_token_ids == [102, 103, 104]


REFUSED = {
    "empty list": ([], GREEDY),
    "empty text": ([""], GREEDY),
    "too long": ([[5] * 256], GREEDY),
    "unknown id": ([[5, 300]], GREEDY),
    "two prompts, three params": ([[5], [6]], [GREEDY] * 3),
    "bias on an unknown id": ([[5]], GREEDY.replace(logit_bias={300: 1.0})),
    "no list": (7, GREEDY),
    "too many allowed ids": ([[5]], GREEDY.replace(allowed_token_ids=[5] * 301)),
    "unknown stop id": ([[5]], GREEDY.replace(stop_token_ids=[-1])),
    "priority without the policy": None,
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_leaves_nothing_behind(llm, plain, case):
    with pytest.raises(RequestError):
        if REFUSED[case] is None:
            llm.generate([[5], [6]], GREEDY, priority=[1, 2], use_tqdm=False)
        else:
            llm.generate(*REFUSED[case], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert one(llm, GREEDY.replace(ignore_eos=True)).token_ids == plain.token_ids


def test_interrupt_aborts_and_the_engine_goes_on(llm, plain, monkeypatch):
    steps = iter(range(100))
    step = llm.llm_engine.step

    def interrupted():
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, GREEDY.replace(ignore_eos=True), use_tqdm=False)
    monkeypatch.undo()
    assert not llm.llm_engine.has_unfinished_requests()
    assert one(llm, GREEDY.replace(ignore_eos=True)).token_ids == plain.token_ids


@pytest.fixture
def interrupts():
    """As a terminal's: jobs in a shell's background are started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_real_interrupt_in_a_step_waits_for_its_end(llm, plain, monkeypatch):
    """SIGINT arrives while the model runs: the step ends whole, then KeyboardInterrupt, and the engine goes on."""
    executor = llm.llm_engine.client.core.executor
    execute, steps = executor.execute_model, iter(range(100))

    def interrupted(plan):
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return execute(plan)

    monkeypatch.setattr(executor, "execute_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, GREEDY.replace(ignore_eos=True), use_tqdm=False)
    monkeypatch.undo()
    assert one(llm, GREEDY.replace(ignore_eos=True)).token_ids == plain.token_ids
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_chat_goes_through_the_template():
    from nybble.engine.demo import demo_checkpoint

    folder = demo_checkpoint("bf16")
    demo = LLM(str(folder), use_tqdm_on_load=False)
    messages = [{"role": "user", "content": "Hi"}]
    (output,) = demo.chat(messages, GREEDY, use_tqdm=False)
    many = demo.chat([messages, messages], GREEDY, use_tqdm=False)
    tokenizer = demo.get_tokenizer()
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)
    assert output.prompt_token_ids == expected == tokenizer.apply_chat_template(messages)
    assert [o.outputs[0].token_ids for o in many] == [output.outputs[0].token_ids] * 2
    demo.shutdown()


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(Exception, match="max_model_len"):
        LLM("x", max_model_length=3)
