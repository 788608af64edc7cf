"""On a CUDA device every kernel is compiled before memory is measured, and what is compiled ahead changes no token."""

from __future__ import annotations

import pytest

from nybble import LLM, SamplingParams
from nybble.engine.worker.gpu_worker import GPUWorker

pytestmark = pytest.mark.gpu

# In proportion to real shapes, or variants of kernels would be met that no real model has: strides are multiples of 16,
# and a chunk of 50 tokens over 254 keys, which a start warms up by, is absorbed (`absorbing_is_cheaper`).
MLA = dict(num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
           v_head_dim=32, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, first_k_dense_replace=1)
MODELS = {"llama": ("Llama", {}, {}), "fp8": ("Llama", {}, {"quantization": "fp8"}),
          "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), {}),
          "eager": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), {"enforce_eager": True}),
          "latent": ("DeepseekV2", MLA, {}), "triton": ("Llama", {}, {"attention_backend": "triton"})}
# Short ones and long ones, a crowd, and one that begins as another that is cached by then.
PROMPTS = [[5] * 3, [7, 8, 9] * 20, list(range(5, 100)), *([11 + i] * 10 for i in range(30)), [*range(5, 100), 7, 8]]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_to_compile(name, make_checkpoint, monkeypatch, tmp_path):
    from triton import knobs

    arch, settings, flags = MODELS[name]
    folder = str(make_checkpoint(arch, **settings))
    late: list[str] = []
    ahead = GPUWorker.compile_kernels

    def compile_kernels(worker):
        ahead(worker)
        knobs.compilation.listener = lambda *, src, **_: late.append(src.name)

    def tokens():
        llm = LLM(folder, use_tqdm_on_load=False, device="cuda", dtype="bfloat16", max_num_seqs=16,
                  num_gpu_blocks_override=200, **flags)
        found = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
        llm.shutdown()
        return [output.outputs[0].token_ids for output in found]

    with monkeypatch.context() as patch:  # compiled when met
        patch.setattr(GPUWorker, "compile_kernels", lambda worker: None)
        expected = tokens()
    with monkeypatch.context() as patch, knobs.compilation.scope(), knobs.cache.scope():
        for function in list(triton_functions()):
            function.device_caches.clear()
        knobs.cache.dir = str(tmp_path)
        patch.setattr(GPUWorker, "compile_kernels", compile_kernels)
        assert tokens() == expected
    assert late == []


def triton_functions():
    """Every Triton kernel that nybble has imported."""
    import sys

    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("nybble.csrc"):
            yield from (found for found in vars(module).values() if isinstance(found, JITFunction))
