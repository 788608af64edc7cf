"""A backend is pinned or has the highest priority, and every other one has a reason."""

from __future__ import annotations

import types

import pytest
import torch

from nybble import hookimpl
from nybble.csrc.attention import prompt_attention_missing
from nybble.engine.attention import triton_paged
from nybble.engine.attention.base import AttentionProblem
from nybble.engine.attention.select import attention_problems, attention_report, choose_attention_backend
from nybble.engine.attention.torch_paged import TorchPagedBackend
from nybble.engine.attention.triton_paged import TritonAttentionBackend
from nybble.models import Attention, MLAAttention
from nybble.plugins.errors import UsageError
from nybble.plugins.manager import PluginHost
from nybble.quant import LayerShape, Linear, Part, Unquantized


class Eager(TorchPagedBackend):
    name = "eager"
    priority = 5


class Narrow(TorchPagedBackend):
    name = "narrow"
    priority = 9

    @classmethod
    def supports(cls, problem):
        return None if problem.head_dim <= 64 else f"head_dim {problem.head_dim} > 64"


@pytest.fixture
def host():
    plugin = types.ModuleType("more_backends")
    plugin.NYBBLE_API = (1, 0)
    plugin.nybble_attention_backends = hookimpl(
        lambda: {"eager": f"{__name__}:Eager", "narrow": f"{__name__}:Narrow"})
    host = PluginHost.load(allow=None, extra=[("more", plugin)])
    targets = {"torch": TorchPagedBackend, "eager": Eager, "narrow": Narrow}
    resolve = host.resolve  # test modules cannot be imported by name
    host.resolve = lambda kind, name: targets.get(name) or resolve(kind, name)
    return host


def problems(head_dim, layers=2):
    attention = [Attention(i, num_heads=2, num_kv_heads=1, head_dim=head_dim) for i in range(layers)]
    return attention_problems(attention, dtype=torch.float32, device=torch.device("cpu"), block_size=16)


@pytest.mark.parametrize("head_dim, pin, chosen, refusals", [
    (64, None, "narrow", {"torch": "narrow goes first (priority 9 over 0)",
                          "eager": "narrow goes first (priority 9 over 5)"}),
    (128, None, "eager", {"torch": "eager goes first (priority 5 over 0)", "narrow": "head_dim 128 > 64"}),
    (128, None, "eager", {"triton": "runs on CUDA, not on cpu"}),
    (128, "torch", "torch", {"triton": "torch is pinned", "narrow": "torch is pinned"}),
])
def test_choice_and_reasons(host, head_dim, pin, chosen, refusals):
    choice = choose_attention_backend(problems(head_dim), pin, host)
    assert choice.chosen.name == chosen and choice.refusals.items() >= refusals.items()


def test_a_pin_that_cannot_run_says_why(host):
    with pytest.raises(UsageError, match="narrow: head_dim 128 > 64"):
        choose_attention_backend(problems(128), "narrow", host)


def test_an_unknown_pin_names_the_nearest(host):
    with pytest.raises(UsageError, match="did you mean narrow"):
        choose_attention_backend(problems(64), "narow", host)


def test_equal_layers_are_one_problem():
    assert len(problems(64, layers=12)) == 1


class PlainOnly(Eager):
    @classmethod
    def supports(cls, problem):
        return None if problem.kv_lora_rank is None else f"latent attention over {problem.kv_lora_rank}"


def test_a_backend_may_refuse_latents(host):
    cpu = dict(dtype=torch.float32, device=torch.device("cpu"))
    kv_b = Linear("", LayerShape(in_features=32, parts=(Part(name="kv_b_proj", size=2 * 40),)), Unquantized(), **cpu)
    layer = MLAAttention(0, kv_b, num_heads=2, qk_nope_head_dim=16, qk_rope_head_dim=8, kv_lora_rank=32, v_head_dim=24,
                         scale=1.0)
    resolve, host.resolve = host.resolve, lambda kind, name: PlainOnly if name == "eager" else resolve(kind, name)
    with pytest.raises(UsageError, match="eager: latent attention over 32"):
        choose_attention_backend(attention_problems([layer], block_size=16, **cpu), "eager", host)
    assert choose_attention_backend(problems(8), "eager", host).chosen is PlainOnly


def test_the_report_says_what_runs_which_part(host):
    class Parted(Eager):
        @classmethod
        def explain(cls, problem):
            return {"prompts": f"a kernel for heads of {problem.head_dim}"}

    host.resolve = lambda kind, name, resolve=host.resolve: Parted if name == "eager" else resolve(kind, name)
    both = problems(128) | problems(80)
    choice = choose_attention_backend(both, None, host)
    report = attention_report(both, choice, layers=4)
    assert str(report) == ("eager, cache in float32; prompts: a kernel for heads of 128 or a kernel for heads of 80")
    assert report.layers == 4 and report.refusals == dict(choice.refusals)


def test_a_backend_that_fails_to_explain_itself_is_used_all_the_same(host, caplog):
    class Mute(Eager):
        @classmethod
        def explain(cls, problem):
            raise ValueError("no words")

    host.resolve = lambda kind, name, resolve=host.resolve: Mute if name == "eager" else resolve(kind, name)
    choice = choose_attention_backend(problems(128), None, host)
    assert str(attention_report(problems(128), choice, layers=2)) == "eager, cache in float32"
    assert "eager does not explain itself: ValueError: no words" in caplog.text


def test_triton_says_what_runs_prompts(monkeypatch):
    """As on a Hopper device with the library at hand."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("nybble.csrc.attention.prompt.op_missing", lambda op, device: None)
    monkeypatch.setattr(triton_paged, "prompt_attention_missing", prompt_attention_missing.__wrapped__)  # not kept
    layers = [Attention(i, num_heads=6, num_kv_heads=2, head_dim=64) for i in range(2)]
    asked = attention_problems(layers, dtype=torch.float16, device=torch.device("cuda", 0), block_size=128)
    [problem] = asked
    assert TritonAttentionBackend.explain(problem) == {"prompts": "prompt_attention"}
    monkeypatch.setattr(TritonAttentionBackend, "supports", lambda problem: None)
    choice = choose_attention_backend(asked, "triton", PluginHost.load(allow=""))
    assert str(attention_report(asked, choice, 2)) == "triton, cache in float16; prompts: prompt_attention"


@pytest.mark.parametrize("change, told", [
    (dict(sliding_window=64), "triton, as prompt_attention has no window"),
    (dict(cache_dtype=torch.float8_e4m3fn), "float8_e4m3fn"), (dict(head_dim=96), "built for heads of 64 or 128"),
])
def test_triton_says_why_prompts_have_no_kernel_of_their_own(change, told):
    problem = dict(device=torch.device("cuda"), dtype=torch.bfloat16, cache_dtype=torch.bfloat16, head_dim=128,
                   num_heads=8, num_kv_heads=2, kv_lora_rank=None, sliding_window=None, block_size=16)
    assert told in TritonAttentionBackend.explain(AttentionProblem(**problem | change))["prompts"]
    assert TritonAttentionBackend.explain(AttentionProblem(**problem | {"kv_lora_rank": 512})) == {}
