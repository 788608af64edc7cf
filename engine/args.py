"""EngineArgs: every user setting of the engine, once. Flags, env names, YAML keys and help come from it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..plugins.manager import PluginHost
    from .config import EngineConfig

DEMO = "nybble-demo"
# Names of the embedded toy model and the form each stands for.
DEMO_FORMS = {DEMO: "gptq"} | {f"{DEMO}-{form}": form for form in ("bf16", "fp8", "awq", "gptq")}


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    choices: tuple[str, ...] | None = None,
    alias: str | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field of a settings class with what the command line and values.py need to know of it.

    `low` and `high` are the least and the greatest value allowed; `above` is a bound not itself allowed.
    """
    meta: dict[str, Any] = {"help": help, "group": group, "choices": choices, "alias": alias}
    meta |= {"low": low, "high": high, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=type(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """User settings, named as in vLLM where it has them; None means "decide from checkpoint or device"."""

    model: str = setting(
        DEMO, "checkpoint folder; nybble-demo (-bf16, -fp8, -awq, -gptq) is the embedded toy model", group="model"
    )
    served_model_name: str | None = setting(
        None, "name clients use (default: the folder's name)", group="model"
    )
    tokenizer: str | None = setting(None, "tokenizer folder (default: the model's)", group="model")
    skip_tokenizer_init: bool = setting(False, "serve token ids only; load no tokenizer", group="model")
    dtype: str = setting(
        "auto",
        "dtype of activations and unquantized weights; auto follows the checkpoint (float32 on CPU)",
        group="model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_model_len: int | None = setting(
        None, "longest prompt plus output, in tokens (1k = 1000, 1K = 1024)", group="model", low=1
    )
    quantization: str | None = setting(
        None, "quantization method (default: what the checkpoint says)", group="model"
    )
    hf_overrides: dict[str, Any] = setting({}, "JSON object laid over config.json", group="model")  # noqa: RUF009
    generation_config: str = setting(
        "auto",
        "auto: sampling defaults and end tokens from generation_config.json; vllm: end tokens only",
        group="model",
        choices=("auto", "vllm"),
    )
    chat_template: str | None = setting(None, "file with a Jinja chat template", group="model")
    trust_remote_code: bool = setting(
        False, "always refused: custom code is an installed plugin", group="model"
    )
    max_logprobs: int = setting(
        20, "most logprobs a request may ask for; -1 allows the whole vocabulary", group="model", low=-1
    )
    logits_processors: list[str] = setting(  # noqa: RUF009
        [], "logits processors to run, by plugin name", group="model"
    )
    seed: int = setting(
        0,
        "seed of requests that bring none, and of dummy weights",
        group="model",
        low=-(2**63),
        high=2**64 - 1,
    )
    load_format: str = setting("auto", "auto, safetensors, dummy, or a loader plugin's name", group="load")
    load_report: str | None = setting(
        None, "print every linear layer, its kernel and why no other runs it", group="load", choices=("table", "json")
    )
    use_tqdm_on_load: bool = setting(True, "progress bar while loading", group="load")
    device: str = setting("auto", "cpu, cuda or cuda:N; auto takes CUDA when there is one", group="device")
    attention_backend: str | None = setting(None, "pin an attention backend", group="device")
    linear_backend: str | None = setting(
        None,
        "pin the kernel of every quantized linear layer that is no expert's; reference is the method's own arithmetic",
        group="device",
    )
    moe_backend: str | None = setting(
        None, "pin what runs the experts of every layer, whatever their format", group="device"
    )
    expert_stats: bool = setting(
        False, "count the tokens of every expert; without CUDA graphs and steps planned ahead", group="device"
    )
    enforce_eager: bool = setting(False, "no CUDA graphs: launch every kernel of every step", group="device")
    cpu_threads: int | None = setting(None, "torch threads on CPU (default: torch's)", group="device", low=1)
    block_size: int = setting(
        16, "tokens in one KV-cache block, a power of two", group="cache", low=1, high=256
    )
    kv_cache_dtype: str = setting(
        "auto",
        "what keys and values are kept in; auto: the model's dtype; fp8: E4M3, with the checkpoint's scales or 1",
        group="cache",
        choices=("auto", "fp8"),
    )
    gpu_memory_utilization: float | None = setting(
        None,
        "share of the device's memory the engine may use (default: 0.9 on CUDA); on CPU, share of the memory now free "
        "that the KV cache may grow to (default: 0.5)",
        group="cache", above=0, high=1,
    )
    kv_cache_memory_bytes: int | None = setting(
        None, "KV-cache bytes, instead of measuring (4G, 512M, ...)", group="cache", low=1
    )
    num_gpu_blocks_override: int | None = setting(
        None, "KV-cache blocks, instead of measuring", group="cache", low=2
    )
    enable_prefix_caching: bool = setting(
        True, "share KV blocks between prompts with a common start", group="cache"
    )
    max_num_seqs: int = setting(256, "most requests in one step", group="scheduler", low=1)
    max_num_batched_tokens: int | None = setting(
        None, "token budget of one step (default: 2048 on CPU, 8192 on CUDA)", group="scheduler", low=1
    )
    enable_chunked_prefill: bool = setting(True, "split long prompts over steps", group="scheduler")
    scheduling_policy: str = setting(
        "fcfs", "order of waiting requests", group="scheduler", choices=("fcfs", "priority")
    )
    long_prefill_token_threshold: int = setting(
        0, "most tokens of one prompt in a step (0: the budget)", group="scheduler", low=0
    )
    max_queue: int = setting(0, "most waiting requests before 429 (0: no limit)", group="scheduler", low=0)
    async_scheduling: bool | None = setting(
        None,
        "plan a step while the one before it runs (default: on CUDA); never with plugin logits processors or "
        "--expert-stats",
        group="scheduler",
    )
    tensor_parallel_size: int = setting(
        1, "devices a layer is split over", group="parallel", alias="-tp", low=1
    )
    distributed_executor_backend: str = setting(
        "uniproc", "how workers run: an executor plugin's name", group="parallel"
    )
    strict_plugins: bool = setting(False, "any plugin failure is fatal", group="plugins")
    prefer: list[str] = setting(  # noqa: RUF009
        [], "settle a name conflict: kind:name=plugin", group="plugins"
    )

    def create_engine_config(self, host: PluginHost | None = None) -> EngineConfig:
        """Read the checkpoint's config, check everything against everything, and freeze the result.

        Raises UsageError or CheckpointError; touches no weights; imports torch only to ask for a CUDA device.
        """
        from .settings import build_engine_config

        return build_engine_config(self, host)


def setting_fields() -> dict[str, Any]:
    """Field objects of EngineArgs by name."""
    return {f.name: f for f in fields(EngineArgs)}
