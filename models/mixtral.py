"""MixtralForCausalLM: Llama's attention, and a feed-forward layer of experts chosen by softmax."""

from __future__ import annotations

from ..moe import MoEBlock, Routing
from .attention import Attention
from .decoder import DecoderLayer, HubDecoderLM, SelfAttention
from .fields import Fields
from .make import Make
from .rope import RopeConfig

# Mistral's own names, and what transformers 5 and some quantizers call them.
PARTS = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))


class MixtralConfig:
    """The fields of config.json that Mixtral implements, with transformers' defaults where it has them."""

    def __init__(self, f: Fields) -> None:
        f.expect("hidden_act", "silu")
        self.vocab = f.integer("vocab_size")
        self.hidden = f.integer("hidden_size")
        self.intermediate = f.integer("intermediate_size")
        self.layers = f.integer("num_hidden_layers")
        self.heads = f.integer("num_attention_heads")
        self.kv_heads = f.integer("num_key_value_heads", 8)
        self.head_dim = f.integer("head_dim", self.hidden // self.heads)
        self.eps = f.number("rms_norm_eps")
        self.experts = f.integer("num_local_experts", 8)
        self.top_k = f.integer("num_experts_per_tok", 2)
        self.sliding_window = f.integer("sliding_window", None)
        self.tied = f.flag("tie_word_embeddings", False)
        f.expect("is_causal", True)
        self.rope = RopeConfig.read(f)
        f.finish()


class MixtralForCausalLM(HubDecoderLM):
    def __init__(self, fields: Fields, make: Make) -> None:
        c = MixtralConfig(fields)
        super().__init__(c, make, c.head_dim, lambda index, at: mixtral_layer(index, c, at))


def mixtral_layer(index: int, c: MixtralConfig, make: Make) -> DecoderLayer:
    attn, block = make.at("self_attn"), make.either("block_sparse_moe", "mlp", probe="gate")
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return DecoderLayer(
        input_norm=make.norm("input_layernorm", c.hidden, c.eps),
        attn=SelfAttention(
            attn.fused([("q_proj", q), ("k_proj", kv), ("v_proj", kv)], c.hidden),
            Attention(index, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
                      sliding_window=c.sliding_window, prefix=attn.prefix),
            attn.linear("o_proj", q, c.hidden),
        ),
        post_norm=make.norm("post_attention_layernorm", c.hidden, c.eps),
        mlp=MoEBlock(
            block.router("gate", c.hidden, c.experts, Routing(top_k=c.top_k, renormalize=True)),
            block.experts("experts", c.experts, c.hidden, c.intermediate, top_k=c.top_k, parts=PARTS),
        ),
    )
