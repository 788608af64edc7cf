"""The models and workloads that nybble is timed on beside another engine, with that engine's numbers and our goals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .floors import Floors

PEER = "vLLM 0.24.0"
PEER_DEVICE = "NVIDIA H100 80GB HBM3"
# One H100's measured rates, which the goals were set by: copy, 8192^3 bf16 product, torch._scaled_mm 4096x28672x4096.
H100 = Floors(bandwidth=3.0e12, operations={"float": 798e12, "fp8_e4m3": 1453e12, "int8": 1453e12})
# Tokens in the cache of each request while the floor's step runs.
FLOOR_CONTEXT = 200


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`count` prompts of `prompt` random tokens given at once, `new` tokens each.

    With `base` the result is milliseconds per step: the time for `new` tokens less that for `base`, by their
    difference. Without it is tokens per second, of the prompts where one token each is all that is asked.
    """

    count: int
    prompt: int
    new: int
    base: int | None = None

    @property
    def unit(self) -> str:
        return "ms" if self.base is not None else "tok/s"

    @property
    def counted(self) -> int:
        """Tokens that the rate counts."""
        return self.count * (self.prompt if self.new == 1 else self.new)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a workload took under the peer, and what it shall take here; None where nobody measured."""

    peer: float | None
    goal: float | None


WORKLOADS = {
    "bs1": Workload(count=1, prompt=128, new=136, base=8),
    "bs32": Workload(count=32, prompt=128, new=136, base=8),
    "prefill": Workload(count=16, prompt=2048, new=1),
    "mixed": Workload(count=256, prompt=512, new=128),
}
TINY_WORKLOADS = {
    "bs1": Workload(count=1, prompt=8, new=6, base=2),
    "bs32": Workload(count=4, prompt=8, new=6, base=2),
    "prefill": Workload(count=2, prompt=32, new=1),
    "mixed": Workload(count=4, prompt=16, new=4),
}
STARTS = ("start_cold", "start_warm")


@dataclass(frozen=True, kw_only=True)
class PeerModel:
    """One column of the comparison: a public model's shape, and its cells by workload ("start_cold" among them)."""

    config: dict[str, Any]
    cells: Mapping[str, Cell] = field(default_factory=dict)
    workloads: Mapping[str, Workload] = field(default_factory=lambda: WORKLOADS)
    toy: bool = False


# The head stays in 16 bits, as FP8 checkpoints and the peer have it, made-up weights included.
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
LLAMA3_8B: dict[str, Any] = COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "bos_token_id": 128000,
    "eos_token_id": 128001, "attention_bias": False, "mlp_bias": False,
}
MIXTRAL: dict[str, Any] = COMMON | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "num_local_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": None, "router_aux_loss_coef": 0.02, "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK_V2_LITE: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 102400, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 163840, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "attention_bias": False,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
                     "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "rope_type": "yarn"},
    "bos_token_id": 100000, "eos_token_id": 100001,
}
TINY: dict[str, Any] = MIXTRAL | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256, "num_local_experts": 4,
}


def _cells(bs1: tuple[float, float], bs32: tuple[float, float], prefill: tuple[float, float],
           mixed: tuple[float, float], cold: tuple[float | None, float],
           warm: tuple[float | None, float]) -> dict[str, Cell]:
    """(peer, goal) of each workload in order."""
    return {name: Cell(peer=peer, goal=goal) for name, (peer, goal)
            in zip((*WORKLOADS, *STARTS), (bs1, bs32, prefill, mixed, cold, warm))}


# Cheap ones first: a run that is cut short has told the most.
MODELS: dict[str, PeerModel] = {
    "dsv2-lite-fp8": PeerModel(
        config=DEEPSEEK_V2_LITE | {"quantization_config": FP8},
        cells=_cells((4.06, 1.8), (4.83, 3.4), (95.7e3, 160e3), (14234, 22000), (129, 20), (78, 8))),
    "llama3-8b-awq": PeerModel(
        config=LLAMA3_8B | {"quantization_config": AWQ},
        cells=_cells((4.16, 2.1), (5.52, 2.8), (45.8e3, 52e3), (6717, 9500), (None, 20), (74, 8))),
    "llama3-8b-fp8": PeerModel(
        config=LLAMA3_8B | {"quantization_config": FP8},
        cells=_cells((4.27, 3.2), (5.27, 3.6), (68.4e3, 85e3), (8544, 12000), (258, 20), (None, 8))),
    "mixtral-8x7b-gptq": PeerModel(
        config=MIXTRAL | {"quantization_config": GPTQ},
        cells=_cells((5.52, 3.0), (12.24, 9.8), (11.8e3, 27e3), (2048, 4500), (193, 25), (63, 10))),
    "mixtral-8x7b-fp8": PeerModel(
        config=MIXTRAL | {"quantization_config": FP8},
        cells=_cells((7.51, 5.2), (19.18, 17), (38.3e3, 48e3), (3855, 5500), (131, 25), (None, 12))),
}
# No part of "all": a goal of the first bf16 model, and a stand-in that runs on a CPU in seconds.
OTHERS: dict[str, PeerModel] = {
    "llama3-8b-bf16": PeerModel(config=LLAMA3_8B),
    "tiny": PeerModel(config=TINY, workloads=TINY_WORKLOADS, toy=True),
}


def write_model(folder: Path, config: Mapping[str, Any]) -> Path:
    """A checkpoint folder without weights, for `--load-format dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Weights of a model in multiply-adds per token, and what its cache takes.

    Attributes:
        always: multiplied for every token, embedding and head left out. expert: of one expert, over all MoE layers.
        experts, top_k: 0 without experts. head: of the output matrix. kv_bytes: per token of context.
        weight_bytes: of one weight of a linear layer, scales and zeros included.
        kind: which products the device runs them by.
    """

    always: int
    expert: int
    experts: int
    top_k: int
    head: int
    kv_bytes: int
    weight_bytes: float
    kind: str

    @property
    def per_token(self) -> int:
        """Multiply-adds of one token, the head left out."""
        return self.always + self.top_k * self.expert

    def expected_experts(self, tokens: int) -> float:
        """Distinct experts of a layer that `tokens` choose, if every choice is as likely as any other."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens) if self.experts else 0.0


# A 4-bit weight in groups of 128 with a 16-bit scale and a 4-bit zero point.
INT4_BYTES = 0.5 + 2.5 / 128


def sizes(config: Mapping[str, Any]) -> Sizes:
    """Of a Llama, Mixtral or DeepSeek-V2 config."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    method = config.get("quantization_config", {}).get("quant_method")
    if "kv_lora_rank" in config:
        latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        attention = heads * hidden * (nope + rope + value) + hidden * (latent + rope) + latent * heads * (nope + value)
        cached = latent + rope
    else:
        width, kv_heads = hidden // heads, config["num_key_value_heads"]
        attention, cached = hidden * width * 2 * (heads + kv_heads), 2 * kv_heads * width
    experts = config.get("n_routed_experts", config.get("num_local_experts", 0))
    dense_layers = config.get("first_k_dense_replace", 0) if experts else layers
    expert = 3 * hidden * config.get("moe_intermediate_size", config["intermediate_size"]) if experts else 0
    shared = config.get("n_shared_experts", 0) * expert
    return Sizes(
        always=layers * attention + dense_layers * 3 * hidden * config["intermediate_size"]
        + (layers - dense_layers) * shared,
        expert=(layers - dense_layers) * expert, experts=experts, top_k=config.get("num_experts_per_tok", 0),
        head=config["vocab_size"] * hidden, kv_bytes=2 * cached * layers,
        weight_bytes={None: 2.0, "fp8": 1.0, "awq": INT4_BYTES, "gptq": INT4_BYTES}[method],
        kind="fp8_e4m3" if method == "fp8" else "float",
    )


def floor_of(config: Mapping[str, Any], workload: Workload, floors: Floors, hit: float | None = None) -> float | None:
    """The least a workload can measure: milliseconds per step or tokens per second; None where none is worked out.

    A step reads every weight that is used once, the head and the cached context; a prompt multiplies. `hit` is the
    number of distinct experts a layer was seen to use; None expects uniform routing.
    """
    of = sizes(config)
    if workload.base is not None:
        batch = workload.count
        used = of.always + (of.expected_experts(batch) if hit is None else hit) * of.expert
        moved = used * of.weight_bytes + of.head * 2 + batch * FLOOR_CONTEXT * of.kv_bytes
        return 1e3 * floors.seconds(moved, 2.0 * batch * (of.per_token + of.head), of.kind)
    return 1 / floors.seconds(0, 2.0 * of.per_token, of.kind) if workload.new == 1 else None
