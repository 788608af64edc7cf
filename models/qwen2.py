"""Qwen2ForCausalLM: Llama's shape with biases on q, k and v, and a window on the upper layers when switched on."""

from __future__ import annotations

from collections.abc import Mapping

from .attention import Attention
from .decoder import DecoderLayer, HubDecoderLM, SelfAttention
from .fields import Fields
from .layers import GatedMLP
from .make import Make
from .rope import ROTARY_TABLES, RopeConfig


class Qwen2Config:
    """The fields of config.json that Qwen2 implements, with transformers' defaults where it has them."""

    def __init__(self, f: Fields) -> None:
        f.expect("hidden_act", "silu")
        f.expect("is_causal", True)
        self.vocab = f.integer("vocab_size")
        self.hidden = f.integer("hidden_size")
        self.intermediate = f.integer("intermediate_size")
        self.layers = f.integer("num_hidden_layers")
        self.heads = f.integer("num_attention_heads")
        self.kv_heads = f.integer("num_key_value_heads", self.heads)
        self.head_dim = f.integer("head_dim", self.hidden // self.heads)
        self.eps = f.number("rms_norm_eps")
        self.tied = f.flag("tie_word_embeddings", False)
        self.windows = layer_windows(f, self.layers)
        self.rope = RopeConfig.read(f)
        f.finish()


def layer_windows(f: Fields, layers: int) -> list[int | None]:
    """Each layer's window: by `layer_types`, else from `max_window_layers` on, and only with `use_sliding_window`."""
    on = f.flag("use_sliding_window", False)
    window = f.integer("sliding_window", None if "sliding_window" in f.raw else 4096)
    first = f.integer("max_window_layers", 28, zero=True)
    if not on or window is None:
        f.expect("layer_types", ["full_attention"] * layers)
        return [None] * layers
    kinds = f.layer_types(layers)
    if kinds is None:
        return [window if i >= first else None for i in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


class Qwen2ForCausalLM(HubDecoderLM):
    ignored_tensors: Mapping[str, str] = ROTARY_TABLES

    def __init__(self, fields: Fields, make: Make) -> None:
        c = Qwen2Config(fields)
        super().__init__(c, make, c.head_dim, lambda index, at: qwen2_layer(index, c, at))


def qwen2_layer(index: int, c: Qwen2Config, make: Make) -> DecoderLayer:
    attn, mlp = make.at("self_attn"), make.at("mlp")
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return DecoderLayer(
        input_norm=make.norm("input_layernorm", c.hidden, c.eps),
        attn=SelfAttention(
            attn.fused([("q_proj", q), ("k_proj", kv), ("v_proj", kv)], c.hidden, bias=True),
            Attention(index, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
                      sliding_window=c.windows[index], prefix=attn.prefix),
            attn.linear("o_proj", q, c.hidden),
        ),
        post_norm=make.norm("post_attention_layernorm", c.hidden, c.eps),
        mlp=GatedMLP(
            mlp.fused([("gate_proj", c.intermediate), ("up_proj", c.intermediate)], c.hidden),
            mlp.linear("down_proj", c.intermediate, c.hidden),
        ),
    )
