"""`nybble plan` against what loading then keeps, and against sums by hand at real shapes."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch import nn

from nybble import LLM
from nybble.bench.peers import MODELS, OTHERS, write_model
from nybble.engine.args import EngineArgs
from nybble.engine.cli import main
from nybble.engine.cli.plan import GPU_NAMES
from nybble.engine.loader import get_model
from nybble.engine.memory_plan import CONTEXT_BYTES, GPUS, meta_model, plan_memory, weight_bytes
from nybble.models.rope import Rotary
from nybble.moe import Experts
from nybble.plugins.manager import PluginHost
from nybble.quant import Linear

FIXTURES = [
    "dsv2-fp8-block-partial", "dsv2-gptq-int4-actorder", "dsv2lite-awq-g64", "dsv2lite-ct-fp8-static",
    "dsv2lite-fp8-block", "llama-awq", "llama-bf16", "llama-ct-fp8-dynamic", "llama-ct-w4a16-actorder",
    "llama-fp8-static", "llama-gptq-int4-actorder", "llama-gptq-int4-asym-v2", "mixtral-awq", "mixtral-bf16",
    "mixtral-ct-w4a16", "mixtral-fp8-block", "mixtral-fp8-static", "mixtral-gptq-int4-actorder", "mixtral-gptq-int8",
    "qwen2-ct-fp8-static", "qwen2-fp8-block", "qwen2-gptq-int4", "qwen2moe-awq", "qwen2moe-ct-fp8-dynamic",
    "qwen2moe-fp8-block", "qwen2moe-gptq-int4",
]
H100 = GPUS["h100"]


@pytest.fixture
def host():
    return PluginHost.load(allow="")


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The kernels that a GPU would be given, packing on this CPU."""
    for module in ("csrc.scaled_gemm.linear", "csrc.w4a16_gemm.linear", "moe.fused"):
        monkeypatch.setattr(f"nybble.{module}.missing", lambda device, needed: None)
    monkeypatch.setattr("nybble.csrc.cpu_gemm._not_cpu", lambda problem: "stands aside")


def kept(model: nn.Module) -> int:
    """Bytes of every storage that a loaded model holds on to."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Linear):
            found += [*module.weights.values(), *([] if module.bias is None else [module.bias])]
            found += [] if module.kernel is None else [v for v in vars(module.kernel).values() if torch.is_tensor(v)]
        if isinstance(module, Experts):
            found += [tensor for backend, _ in module.runs for tensor in backend.tensors.values()]
        for value in vars(module).values():
            found += [value] if torch.is_tensor(value) else [value.cos, value.sin] if isinstance(value, Rotary) else []
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.nbytes}.values())


def compare(folder, host, **settings):
    config = EngineArgs(model=str(folder), device="cpu", dtype="float16", use_tqdm_on_load=False,
                        skip_tokenizer_init=True, **settings).create_engine_config(host)
    predicted = sum(weight_bytes(meta_model(config, host), torch.float16).values())
    loaded = kept(get_model(config, host, torch.device("cpu")).model)
    assert predicted == pytest.approx(loaded, rel=0.002)


@pytest.mark.parametrize("name", FIXTURES)
def test_real_checkpoints(name, shared_fixtures, host, as_on_cuda):
    compare(shared_fixtures / name, host)


@pytest.mark.parametrize(("arch", "settings"), [
    ("Llama", {"tie_word_embeddings": True}), ("Qwen2", {}), ("Mixtral", {"num_local_experts": 4}),
    ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}),
], ids=lambda v: v if isinstance(v, str) else "")
def test_plain_checkpoints(arch, settings, make_checkpoint, host, as_on_cuda):
    compare(make_checkpoint(arch, **settings), host)


@pytest.mark.parametrize("method", [
    {"quant_method": "fp8", "activation_scheme": "dynamic"}, {"quant_method": "fp8", "activation_scheme": "static"},
    {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False, "desc_act": False},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
], ids=["fp8", "fp8-static", "gptq3", "awq"])
def test_made_up_weights(method, tmp_path, host, as_on_cuda):
    config = OTHERS["tiny"].config | {"intermediate_size": 128, "vocab_size": 320, "quantization_config": method}
    compare(write_model(tmp_path / "m", config), host, load_format="dummy")


LINEAR = 32 * (6144 + 4096 + 28672 + 14336) * 4096  # weights of Llama-3-8B's layers: qkv, o, gate and up, down
ROWS = 32 * (6144 + 4096 + 28672 + 4096)
EMBEDDING, NORMS, ROTARY = 128256 * 4096 * 2, 65 * 4096 * 2, 4 * 128
HEAD_INT4 = 128256 * 4096 // 2 + 128256 * 32 * 3


@pytest.mark.parametrize(("name", "expected", "per_token"), [
    ("llama3-8b-bf16", 2 * LINEAR + 2 * EMBEDDING, 131072),
    ("llama3-8b-fp8", LINEAR + 4 * ROWS + 2 * EMBEDDING, 131072),
    ("llama3-8b-awq", LINEAR // 2 + 3 * LINEAR // 128 + 2 * EMBEDDING, 131072),
])
def test_real_shapes_by_hand(name, expected, per_token, tmp_path, host):
    folder = write_model(tmp_path / name, {**MODELS, **OTHERS}[name].config)
    plan = plan_memory(EngineArgs(model=str(folder), max_model_len=4096), H100, None, host)
    assert plan.weight_bytes == expected + NORMS + 4096 * ROTARY and plan.kv_bytes_per_token == per_token
    assert plan.usable == int(0.9 * H100) and plan.max_num_batched_tokens == 8192
    left = plan.usable - CONTEXT_BYTES - plan.weight_bytes - plan.scratch
    assert plan.kv_tokens == (left // (16 * per_token) - 1) * 16
    assert plan.concurrency == plan.kv_tokens / 4096 and 2**29 < plan.scratch < 2**31


def test_deepseek_by_hand(tmp_path, host):
    folder = write_model(tmp_path / "m", MODELS["dsv2-lite-fp8"].config)
    plan = plan_memory(EngineArgs(model=str(folder), max_model_len=4096), H100, 1000, host)
    experts = 26 * 64 * (3 * 2048 * 1408 + 4 * (2 * 1408 + 2048))
    # queries, the way down, kv_b and its norm in 16 bits, the way out, and scales for the rows of the three in FP8
    attention = 27 * (2048 * 3072 + 2048 * 576 + 2 * 512 * (4096 + 1) + 2048 * 2048 + 4 * (3072 + 576 + 2048))
    assert plan.weights["experts"] == experts and plan.weights["attn"] == attention
    assert plan.kv_bytes_per_token == 27 * 576 * 2 and plan.concurrency == 256


@pytest.mark.parametrize(("flags", "change"), [
    ({"kv_cache_dtype": "fp8"}, 2), ({"kv_cache_memory_bytes": 2**30}, None), ({"num_gpu_blocks_override": 9}, 8 * 16),
], ids=["fp8", "bytes", "blocks"])
def test_settings_count(flags, change, tmp_path, host):
    folder = write_model(tmp_path / "m", MODELS["llama3-8b-fp8"].config)
    plain, plan = (plan_memory(EngineArgs(model=str(folder), **f), H100, None, host) for f in ({}, flags))
    if change is None:
        assert plan.kv_tokens == (2**30 // (16 * 131072) - 1) * 16
    else:
        assert plan.kv_tokens in (change, pytest.approx(change * plain.kv_tokens, rel=1e-3))


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_device")
@pytest.mark.parametrize("name", ["llama3-8b-fp8", "llama3-8b-awq", "dsv2-lite-fp8"])
def test_a_run_measures_what_was_planned(name, tmp_path, host):
    folder = write_model(tmp_path / name, MODELS[name].config)
    args = EngineArgs(model=str(folder), max_model_len=4096, load_format="dummy", skip_tokenizer_init=True)
    plan = plan_memory(args, torch.cuda.get_device_properties(0).total_memory, None, host)
    llm = LLM.from_engine_args(args)
    try:
        core = llm.llm_engine.client.core
        assert plan.weight_bytes == pytest.approx(kept(core.executor.worker.loaded.model), rel=0.01)
        assert plan.kv_tokens == pytest.approx(core.layout.max_tokens, rel=0.05)
    finally:
        llm.shutdown()
        del core
        gc.collect()
        torch.cuda.empty_cache()


def test_command(tmp_path, capsys):
    assert tuple(GPUS) == GPU_NAMES
    folder = str(write_model(tmp_path / "m", MODELS["llama3-8b-fp8"].config))
    assert main(["plan", folder, "--gpu", "H100", "--json", "--context", "4K"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["context"] == 4096 and told["weight_bytes"] == sum(told["weights"].values())
    assert main(["plan", folder, "--gpu", "24G"]) == 0
    assert "131072 bytes" in capsys.readouterr().out
    assert main(["plan", folder, "--gpu", "8G"]) == 4
    assert "does not fit: " in capsys.readouterr().out
    for words in (["--gpu", "b52"], ["--gpu", "h100", "--context", "0"], []):
        assert main(["plan", folder, *words]) == 2
    assert not torch.cuda.is_initialized()
