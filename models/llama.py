"""LlamaForCausalLM: Llama 2 and 3, and Mistral with its sliding window."""

from __future__ import annotations

from collections.abc import Mapping

from .attention import Attention
from .decoder import DecoderLayer, HubDecoderLM, SelfAttention
from .fields import Fields
from .layers import GatedMLP
from .make import Make
from .rope import ROTARY_TABLES, RopeConfig


class LlamaConfig:
    """The fields of config.json that Llama implements, with transformers' defaults where it has them."""

    def __init__(self, f: Fields) -> None:
        f.expect("hidden_act", "silu")
        self.vocab = f.integer("vocab_size")
        self.hidden = f.integer("hidden_size")
        self.intermediate = f.integer("intermediate_size")
        self.layers = f.integer("num_hidden_layers")
        self.heads = f.integer("num_attention_heads")
        self.kv_heads = f.integer("num_key_value_heads", self.heads)
        self.head_dim = f.integer("head_dim", self.hidden // self.heads)
        self.eps = f.number("rms_norm_eps")
        self.attention_bias = f.flag("attention_bias", False)
        self.mlp_bias = f.flag("mlp_bias", False)
        self.tied = f.flag("tie_word_embeddings", False)
        f.expect("is_causal", True)
        self.sliding_window = None
        if f.raw.get("model_type") == "mistral":  # transformers' Llama has no window, whatever the field says
            f.require("sliding_window")  # null and absent differ there: transformers reads absent as 4096
            self.sliding_window = f.integer("sliding_window", None)
        self.rope = RopeConfig.read(f)
        f.finish()


class LlamaForCausalLM(HubDecoderLM):
    ignored_tensors: Mapping[str, str] = ROTARY_TABLES

    def __init__(self, fields: Fields, make: Make) -> None:
        c = LlamaConfig(fields)
        super().__init__(c, make, c.head_dim, lambda index, at: llama_layer(index, c, at))


def llama_layer(index: int, c: LlamaConfig, make: Make) -> DecoderLayer:
    attn, mlp = make.at("self_attn"), make.at("mlp")
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return DecoderLayer(
        input_norm=make.norm("input_layernorm", c.hidden, c.eps),
        attn=SelfAttention(
            attn.fused([("q_proj", q), ("k_proj", kv), ("v_proj", kv)], c.hidden, bias=c.attention_bias),
            Attention(index, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
                      sliding_window=c.sliding_window, prefix=attn.prefix),
            attn.linear("o_proj", q, c.hidden, bias=c.attention_bias),
        ),
        post_norm=make.norm("post_attention_layernorm", c.hidden, c.eps),
        mlp=GatedMLP(
            mlp.fused([("gate_proj", c.intermediate), ("up_proj", c.intermediate)], c.hidden, bias=c.mlp_bias),
            mlp.linear("down_proj", c.intermediate, c.hidden, bias=c.mlp_bias),
        ),
    )
