"""Qwen3MoeForCausalLM: attention whose queries and keys are normalised per head, layers of experts among dense ones."""

from __future__ import annotations

from ..moe import MoEBlock, Routing
from .attention import Attention
from .decoder import DecoderLayer, HubDecoderLM, SelfAttention
from .fields import Fields
from .layers import GatedMLP
from .make import Make
from .rope import RopeConfig

PARTS = (("gate_proj", "up_proj", "down_proj"),)


class Qwen3MoeConfig:
    """The fields of config.json that Qwen3-MoE implements, with transformers' defaults where it has them."""

    def __init__(self, f: Fields) -> None:
        f.expect("hidden_act", "silu")
        f.expect("is_causal", True)
        # Qwen3-Coder's files say so of what every Qwen3-MoE does.
        f.expect("use_qk_norm", True)
        f.expect("qkv_bias", False)
        f.expect("shared_expert_intermediate_size", 0)
        self.vocab = f.integer("vocab_size")
        self.hidden = f.integer("hidden_size")
        self.intermediate = f.integer("intermediate_size")
        self.layers = f.integer("num_hidden_layers")
        self.heads = f.integer("num_attention_heads")
        self.kv_heads = f.integer("num_key_value_heads", 4)
        self.head_dim = f.integer("head_dim", self.hidden // self.heads)
        self.attention_bias = f.flag("attention_bias", False)
        self.eps = f.number("rms_norm_eps")
        # The files of the hub say num_experts, those of transformers 5 num_local_experts.
        self.experts = f.integer("num_experts", f.integer("num_local_experts", None) or ...)
        self.top_k = f.integer("num_experts_per_tok", 8)
        self.renormalize = f.flag("norm_topk_prob", False)
        self.expert_intermediate = f.integer("moe_intermediate_size")
        dense, step = f.indices("mlp_only_layers", self.layers), f.integer("decoder_sparse_step", 1)
        self.sparse = [i not in dense and (i + 1) % step == 0 for i in range(self.layers)]
        self.tied = f.flag("tie_word_embeddings", False)
        self.sliding_window = layers_window(f)
        self.rope = RopeConfig.read(f)
        f.finish()


def layers_window(f: Fields) -> int | None:
    """The window of every layer, if `use_sliding_window`; `max_window_layers` is written, and never minded."""
    window: int | None = f.integer("sliding_window", None if "sliding_window" in f.raw else 4096)
    f.integer("max_window_layers", None, zero=True)
    return window if f.flag("use_sliding_window", False) else None


class Qwen3MoeForCausalLM(HubDecoderLM):
    def __init__(self, fields: Fields, make: Make) -> None:
        c = Qwen3MoeConfig(fields)
        super().__init__(c, make, c.head_dim, lambda index, at: qwen3_moe_layer(index, c, at))


def qwen3_moe_layer(index: int, c: Qwen3MoeConfig, make: Make) -> DecoderLayer:
    attn, mlp = make.at("self_attn"), make.at("mlp")
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return DecoderLayer(
        input_norm=make.norm("input_layernorm", c.hidden, c.eps),
        attn=SelfAttention(
            attn.fused([("q_proj", q), ("k_proj", kv), ("v_proj", kv)], c.hidden, bias=c.attention_bias),
            Attention(index, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
                      sliding_window=c.sliding_window, prefix=attn.prefix,
                      norms=(attn.norm("q_norm", c.head_dim, c.eps), attn.norm("k_norm", c.head_dim, c.eps))),
            attn.linear("o_proj", q, c.hidden, bias=c.attention_bias),
        ),
        post_norm=make.norm("post_attention_layernorm", c.hidden, c.eps),
        mlp=MoEBlock(
            mlp.router("gate", c.hidden, c.experts, Routing(top_k=c.top_k, renormalize=c.renormalize)),
            mlp.experts("experts", c.experts, c.hidden, c.expert_intermediate, top_k=c.top_k, parts=PARTS),
        ) if c.sparse[index] else GatedMLP(
            mlp.fused([("gate_proj", c.intermediate), ("up_proj", c.intermediate)], c.hidden),
            mlp.linear("down_proj", c.intermediate, c.hidden),
        ),
    )
