"""EngineConfig and its parts: frozen, checked where they are made (args.py), sent whole to every worker.

Plain dataclasses of plain values, so that msgspec carries them between processes without pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is served.

    Attributes:
        model: folder of the checkpoint (absolute), or a name of the demo before it is resolved.
        hf_config: config.json after `hf_overrides`, untouched otherwise.
        architecture: the entry of `architectures` that a plugin implements.
        dtype: torch dtype name of activations and unquantized weights ("float32", "bfloat16", "float16").
        quantization: the method's plugin name; `quantization_config` is what the checkpoint says of it.
        max_model_len: longest prompt plus output, in tokens.
        generation_config: generation_config.json, or {} when absent or switched off.
        is_demo: the embedded toy checkpoint; stamped on everything that reports about it.
    """

    model: str
    served_model_name: str
    tokenizer: str | None
    hf_config: dict[str, Any]
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    quantization: str | None = None
    quantization_config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_logprobs: int = 20
    generation_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    logits_processors: tuple[str, ...] = ()
    is_demo: bool = False

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: generation_config first, config.json second; a list or one id."""
        eos = self.generation_config.get("eos_token_id")
        if eos is None:
            eos = self.hf_config.get("eos_token_id")
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache: size in bytes or as a share of device memory, and how prompts share it.

    `kv_cache_dtype` "auto" is the model's, "fp8" is E4M3 with each layer's scales from the checkpoint, else 1.
    `num_gpu_blocks` fixes the pool size in blocks, whatever the device; None measures it.
    """

    block_size: int = 16
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks: int | None = None
    enable_prefix_caching: bool = True


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How a step is filled.

    `max_num_batched_tokens` is the one budget of a step; `long_prefill_token_threshold` caps one request's share of it
    (0 = no cap); `max_queue` refuses newcomers with 429 when that many requests wait (0 = no limit); `async_scheduling`
    plans a step while the one before it runs.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    long_prefill_token_threshold: int = 0
    num_lookahead_slots: int = 0
    max_queue: int = 0
    async_scheduling: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Several devices. One device is what runs today; the sizes are here so that every layer carries them."""

    tensor_parallel_size: int = 1
    rank: int = 0
    executor: str = "uniproc"


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where the model runs and how attention is computed; `attention_backend` None lets priority decide.

    `enforce_eager` launches every kernel of every step: no CUDA graphs.
    """

    device: str = "cpu"
    attention_backend: str | None = None
    linear_backend: str | None = None
    moe_backend: str | None = None
    expert_stats: bool = False
    enforce_eager: bool = False
    cpu_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Where weights come from: a loader plugin's name ("auto", "safetensors", "dummy"); `report` "table" or "json"
    prints what became of every linear layer."""

    load_format: str = "auto"
    report: str | None = None
    use_tqdm: bool = True


@dataclass(frozen=True, kw_only=True)
class PluginConfig:
    """Which plugins take part, and what the parent process found, so that a worker can check it finds the same."""

    strict: bool = False
    prefer: tuple[str, ...] = ()
    fingerprint: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to know, decided (the seed's VllmConfig)."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    device: DeviceConfig = DeviceConfig()
    load: LoadConfig = LoadConfig()
    plugins: PluginConfig = PluginConfig()
