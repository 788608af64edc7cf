"""Qwen2MoeForCausalLM: Qwen2's attention, layers of experts among dense ones, and a gated expert for every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe import MoEBlock, Routing
from .attention import Attention
from .decoder import DecoderLayer, HubDecoderLM, SelfAttention
from .fields import Fields
from .layers import GatedMLP
from .make import Make
from .rope import RopeConfig

PARTS = (("gate_proj", "up_proj", "down_proj"),)


class Qwen2MoeConfig:
    """The fields of config.json that Qwen2-MoE implements, with transformers' defaults where it has them."""

    def __init__(self, f: Fields) -> None:
        f.expect("hidden_act", "silu")
        f.expect("is_causal", True)
        self.vocab = f.integer("vocab_size")
        self.hidden = f.integer("hidden_size")
        self.intermediate = f.integer("intermediate_size")
        self.layers = f.integer("num_hidden_layers")
        self.heads = f.integer("num_attention_heads")
        self.kv_heads = f.integer("num_key_value_heads", 16)
        self.head_dim = f.integer("head_dim", self.hidden // self.heads)
        self.qkv_bias = f.flag("qkv_bias", True)
        self.eps = f.number("rms_norm_eps")
        self.experts = f.integer("num_experts")
        self.top_k = f.integer("num_experts_per_tok", 4)
        self.renormalize = f.flag("norm_topk_prob", False)
        self.expert_intermediate = f.integer("moe_intermediate_size")
        self.shared_intermediate = f.integer("shared_expert_intermediate_size")
        dense, step = f.indices("mlp_only_layers", self.layers), f.integer("decoder_sparse_step", 1)
        self.sparse = [i not in dense and (i + 1) % step == 0 for i in range(self.layers)]
        self.tied = f.flag("tie_word_embeddings", False)
        self.windows = layer_windows(f, self.layers)
        self.rope = RopeConfig.read(f)
        f.finish()


def layer_windows(f: Fields, layers: int) -> list[int | None]:
    """Each layer's window: by `layer_types`, else on every other layer below `max_window_layers`, as transformers does;
    and only with `use_sliding_window`, without which `sliding_window` may be 0."""
    on = f.flag("use_sliding_window", False)
    window = f.integer("sliding_window", None if "sliding_window" in f.raw else 4096, zero=not on)
    end = f.integer("max_window_layers", 28, zero=True)
    if not on or window is None:
        f.expect("layer_types", ["full_attention"] * layers)
        return [None] * layers
    kinds = f.layer_types(layers)
    if kinds is None:
        return [window if i % 2 == 0 and i < end else None for i in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


class Qwen2MoeForCausalLM(HubDecoderLM):
    def __init__(self, fields: Fields, make: Make) -> None:
        c = Qwen2MoeConfig(fields)
        super().__init__(c, make, c.head_dim, lambda index, at: qwen2_moe_layer(index, c, at))


def qwen2_moe_layer(index: int, c: Qwen2MoeConfig, make: Make) -> DecoderLayer:
    attn, mlp = make.at("self_attn"), make.at("mlp")
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return DecoderLayer(
        input_norm=make.norm("input_layernorm", c.hidden, c.eps),
        attn=SelfAttention(
            attn.fused([("q_proj", q), ("k_proj", kv), ("v_proj", kv)], c.hidden, bias=c.qkv_bias),
            Attention(index, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
                      sliding_window=c.windows[index], prefix=attn.prefix),
            attn.linear("o_proj", q, c.hidden),
        ),
        post_norm=make.norm("post_attention_layernorm", c.hidden, c.eps),
        mlp=MoEBlock(
            mlp.router("gate", c.hidden, c.experts, Routing(top_k=c.top_k, renormalize=c.renormalize)),
            mlp.experts("experts", c.experts, c.hidden, c.expert_intermediate, top_k=c.top_k, parts=PARTS),
            SharedExpert(mlp.gate("shared_expert_gate", c.hidden, 1),
                         gated_mlp(mlp.at("shared_expert"), c.hidden, c.shared_intermediate)),
        ) if c.sparse[index] else gated_mlp(mlp, c.hidden, c.intermediate),
    )


def gated_mlp(make: Make, hidden: int, intermediate: int) -> GatedMLP:
    return GatedMLP(make.fused([("gate_proj", intermediate), ("up_proj", intermediate)], hidden),
                    make.linear("down_proj", intermediate, hidden))


class SharedExpert(nn.Module):
    """The expert of every token, weighed by a sigmoid: x [T, hidden] -> [T, hidden]."""

    def __init__(self, gate: nn.Module, mlp: GatedMLP) -> None:
        super().__init__()
        self.gate, self.mlp = gate, mlp

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * self.mlp(x)
