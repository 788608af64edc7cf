"""The parts nybble brings itself, as strings: a plugin like any other, loaded through the same door."""

from __future__ import annotations

from typing import Any

from .hookspecs import Table, hookimpl

NYBBLE_API = (1, 0)


@hookimpl
def nybble_models() -> Table:
    return {
        "DeepseekV2ForCausalLM": "nybble.models.deepseek_v2:DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM": "nybble.models.deepseek_v2:DeepseekV3ForCausalLM",
        "LlamaForCausalLM": "nybble.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "nybble.models.llama:LlamaForCausalLM",
        "MixtralForCausalLM": "nybble.models.mixtral:MixtralForCausalLM",
        "Qwen2ForCausalLM": "nybble.models.qwen2:Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM": "nybble.models.qwen2_moe:Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM": "nybble.models.qwen3_moe:Qwen3MoeForCausalLM",
    }


@hookimpl
def nybble_quants() -> Table:
    return {
        "awq": "nybble.quant.awq:AWQConfig",
        "compressed-tensors": "nybble.quant.compressed_tensors:CompressedTensorsConfig",
        "fp8": "nybble.quant.fp8:Fp8Config",
        "gptq": "nybble.quant.gptq:GPTQConfig",
    }


@hookimpl
def nybble_kernels() -> Table:
    return {
        "cpu_int4": "nybble.csrc.cpu_gemm:CpuInt4Kernel",
        "cpu_int8": "nybble.csrc.cpu_gemm:CpuInt8Kernel",
        "cpu_int8_int8": "nybble.csrc.cpu_gemm:CpuInt8Int8Kernel",
        "cutlass_fp8": "nybble.csrc.fp8_gemm:CutlassFp8Kernel",
        "tiles": "nybble.csrc.tiles:TileKernel",
        "triton_w4a16": "nybble.csrc.w4a16_gemm:TritonW4A16Kernel",
        "triton_w8a16": "nybble.csrc.scaled_gemm:TritonWeightOnlyKernel",
        "triton_w8a8": "nybble.csrc.scaled_gemm:TritonScaledKernel",
    }


@hookimpl
def nybble_moe_backends() -> Table:
    return {
        "cutlass": "nybble.moe.cutlass:CutlassBackend",
        "fused": "nybble.moe.fused:FusedBackend",
        "reference": "nybble.moe.reference:ReferenceBackend",
    }


@hookimpl
def nybble_attention_backends() -> Table:
    return {
        "cpu": "nybble.engine.attention.cpu_paged:CpuAttentionBackend",
        "cuda_paged": "nybble.engine.attention.cuda_paged:PagedAttention",
        "flash": "nybble.engine.attention.flash:FlashAttentionBackend",
        "torch": "nybble.engine.attention.torch_paged:TorchPagedBackend",
        "triton": "nybble.engine.attention.triton_paged:TritonAttentionBackend",
    }


@hookimpl
def nybble_executors() -> Table:
    return {"uniproc": "nybble.engine.executor.uniproc:UniProcExecutor"}


@hookimpl
def nybble_loaders() -> Table:
    return {
        "safetensors": "nybble.engine.loader.safetensors_loader:SafetensorsLoader",
        "dummy": "nybble.engine.loader.dummy_loader:DummyLoader",
    }


@hookimpl
def nybble_cli(commands: Any) -> None:
    commands.add("bench", "measure kernels, latency, throughput and serving", "nybble.bench.cli:main")
    commands.add("eval", "score a checkpoint, and compare it with a reference", "nybble.bench.eval.cli:main")
