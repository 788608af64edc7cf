"""How many kernels a decoder layer launches for a step that only decodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.bench.methods import METHODS
from nybble.csrc.ops import op_missing
from nybble.engine.args import EngineArgs
from nybble.engine.attention.base import StepShape
from nybble.engine.attention.triton_paged import TritonAttentionBackend
from nybble.engine.loader import get_model
from nybble.engine.plan import KVCacheLayout
from nybble.models import Batch
from nybble.plugins.manager import PluginHost

COMMON = {"num_hidden_layers": 3, "hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 512,
          "intermediate_size": 2048, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
          "tie_word_embeddings": False, "hidden_act": "silu"}
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2}
MIXTRAL = {**COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_key_value_heads": 2,
           "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
DEEPSEEK = {**COMMON, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_key_value_heads": 8,
            "moe_intermediate_size": 1408, "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6,
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
            "v_head_dim": 128, "routed_scaling_factor": 1.0, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1,
            "rope_scaling": None, "attention_bias": False}
PAGE = 16


def layer_kernels(folder: Path, config: Mapping[str, Any], method: str | None = None, *, requests: int = 8,
                  length: int = 100, dtype: str = "bfloat16", **settings: Any) -> list[str]:
    """The kernels of the last layer of a model with made-up weights, in order, `requests` tokens at once."""
    quantized = {"quantization_config": METHODS[method]} if method else {}
    (folder / "config.json").write_text(json.dumps({**config, **quantized, "torch_dtype": dtype}))
    host, device = PluginHost.load(allow=""), torch.device("cuda")
    args = EngineArgs(model=str(folder), device="cuda", load_format="dummy", skip_tokenizer_init=True, dtype=dtype,
                      use_tqdm_on_load=False, **settings)
    model = get_model(args.create_engine_config(host), host, device).model
    pages = -(-length // PAGE)
    layout = KVCacheLayout(num_blocks=requests * pages + 1, block_size=PAGE, groups=[])
    backend = TritonAttentionBackend(model.attention_layers(), layout, dtype=getattr(torch, dtype), device=device)
    for cache in backend.caches:
        cache.zero_()
    table = torch.arange(1, requests * pages + 1, dtype=torch.int32).view(requests, pages)
    lengths = torch.full((requests,), length, dtype=torch.int32)
    slots = table[:, -1].long() * PAGE + (length - 1) % PAGE
    step = StepShape(query_lens=np.ones(requests, np.int32), seq_lens=lengths.numpy(), block_table=table.cuda(),
                     host_block_table=table.numpy(), slots=slots.cuda(), max_query_len=1,
                     query_start=torch.arange(requests + 1, dtype=torch.int32, device=device),
                     device_seq_lens=lengths.cuda())
    positions = torch.full((requests,), length - 1, device=device)
    batch = Batch(ids=torch.arange(requests, device=device), positions=positions, attn=backend.prepare(step))
    layer, rope = model.layers[-1], model.rotary(positions)
    x, residual = (torch.randn(requests, config["hidden_size"], device=device, dtype=getattr(torch, dtype))
                   for _ in range(2))
    with torch.inference_mode():
        for _ in range(2):  # the first time kernels are compiled, and the profiler starts
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as trace:
                layer(x, residual, rope, batch)
                torch.cuda.synchronize()
    launched = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in sorted(launched, key=lambda event: event.time_range.start)]


@pytest.mark.gpu
@pytest.mark.parametrize("config, method, most", [
    pytest.param(LLAMA, None, 9, id="llama"), pytest.param(LLAMA, "ct-fp8", 9, id="llama fp8"),
    pytest.param(LLAMA, "awq", 9, id="llama awq"), pytest.param(MIXTRAL, None, 12, id="mixtral"),
    pytest.param(MIXTRAL, "ct-fp8", 13, id="mixtral fp8"), pytest.param(MIXTRAL, "gptq-4", 12, id="mixtral gptq"),
    pytest.param(DEEPSEEK, "ct-fp8", 19, id="deepseek fp8"),
])
@pytest.mark.parametrize("length", [100, 2000])
def test_a_decoding_layer_is_few_kernels(config, method, most, length, tmp_path):
    """Splits of the keys are merged by a launch of their own, since the last program of a split took longer to do it
    (9.8 us against 7.0 on an H100)."""
    if method == "ct-fp8" and (reason := op_missing("fp8_gemm", torch.device("cuda"))) is not None:
        pytest.skip(f"without CUTLASS an output of attention is rounded by a launch of its own: {reason}")
    names = layer_kernels(tmp_path, config, method, length=length)
    assert 5 < len(names) <= most, "\n".join(names)
