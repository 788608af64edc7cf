"""GraniteForCausalLM: Llama with a factor on embeddings, attention scores, residual branches and logits."""

from torch import nn

from nybble.models import Attention
from nybble.models.decoder import DecoderLayer, DecoderLM, SelfAttention
from nybble.models.layers import GatedMLP, TiedHead
from nybble.models.rope import RopeConfig


class GraniteConfig:
    """The fields of config.json that Granite implements; `finish` refuses a checkpoint that has others."""

    def __init__(self, fields):
        fields.expect("hidden_act", "silu")
        fields.expect("attention_bias", False)
        fields.expect("mlp_bias", False)
        self.vocab = fields.integer("vocab_size")
        self.hidden = fields.integer("hidden_size")
        self.intermediate = fields.integer("intermediate_size")
        self.layers = fields.integer("num_hidden_layers")
        self.heads = fields.integer("num_attention_heads")
        self.kv_heads = fields.integer("num_key_value_heads", self.heads)
        self.head_dim = self.hidden // self.heads
        self.eps = fields.number("rms_norm_eps")
        self.tied = fields.flag("tie_word_embeddings", False)
        self.on_embedding = fields.number("embedding_multiplier", 1.0)
        self.on_attention = fields.number("attention_multiplier", 1.0)
        self.on_residual = fields.number("residual_multiplier", 1.0)
        self.on_logits = 1 / fields.number("logits_scaling", 1.0)
        self.rope = RopeConfig.read(fields)
        fields.finish()


class Scaled(nn.Module):
    """inner(...) * factor."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args):
        return self.inner(*args) * self.factor


class GraniteForCausalLM(DecoderLM):
    def __init__(self, fields, make):
        c, body = GraniteConfig(fields), make.at("model")
        embed = body.embedding("embed_tokens", c.vocab, c.hidden)
        head = TiedHead("lm_head", embed) if c.tied else make.linear("lm_head", c.hidden, c.vocab)
        super().__init__(
            embed=Scaled(embed, c.on_embedding),
            rotary=make.rotary(c.rope, c.head_dim),
            layers=[granite_layer(i, c, body.at(f"layers.{i}")) for i in range(c.layers)],
            norm=body.norm("norm", c.hidden, c.eps),
            head=Scaled(head, c.on_logits),
        )


def granite_layer(index, c, make):
    attn, mlp = make.at("self_attn"), make.at("mlp")
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = SelfAttention(
        attn.fused([("q_proj", q), ("k_proj", kv), ("v_proj", kv)], c.hidden),
        Attention(index, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
                  scale=c.on_attention, prefix=attn.prefix),
        attn.linear("o_proj", q, c.hidden),
    )
    feed_forward = GatedMLP(
        mlp.fused([("gate_proj", c.intermediate), ("up_proj", c.intermediate)], c.hidden),
        mlp.linear("down_proj", c.intermediate, c.hidden),
    )
    return DecoderLayer(
        input_norm=make.norm("input_layernorm", c.hidden, c.eps),
        attn=Scaled(attention, c.on_residual),
        post_norm=make.norm("post_attention_layernorm", c.hidden, c.eps),
        mlp=Scaled(feed_forward, c.on_residual),
    )
