"""DeepseekV2ForCausalLM and DeepseekV3ForCausalLM: latent attention, dense layers first, then experts in groups."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..moe import MoEBlock, Routing
from ..plugins.errors import CheckpointError
from ..quant import SplitLinear
from .decoder import DecoderLayer, HubDecoderLM
from .fields import Fields
from .layers import GatedMLP
from .make import Make
from .mla import LatentQuery, LatentSelfAttention, MLAAttention, softmax_scale
from .rope import ROTARY_TABLES, RopeConfig

# The norms of the latents keep their class's own epsilon, whatever rms_norm_eps says.
LATENT_EPS = 1e-6
PARTS = (("gate_proj", "up_proj", "down_proj"),)


class DeepseekV2Config:
    """The fields of config.json that DeepSeek-V2 implements, with transformers' defaults where it has them."""

    def __init__(self, f: Fields) -> None:
        f.expect("hidden_act", "silu")
        self.vocab = f.integer("vocab_size")
        self.hidden = f.integer("hidden_size")
        self.intermediate = f.integer("intermediate_size")
        self.layers = f.integer("num_hidden_layers")
        self.eps = f.number("rms_norm_eps", 1e-6)
        self.attention_bias = f.flag("attention_bias", False)
        self.tied = f.flag("tie_word_embeddings", False)
        f.expect("is_causal", True)
        self._attention(f)
        self._experts(f)
        self.rope = RopeConfig.read(f)
        self.scale = softmax_scale(self.rope, self.nope + self.rotated)
        self._own(f)
        self._check(self.routing)
        f.finish()

    def _check(self, r: Routing) -> None:
        """Raises CheckpointError for a choice of experts that cannot be made."""
        if self.experts % r.groups or r.top_groups > r.groups:
            raise CheckpointError(f"config.json: n_group {r.groups} and topk_group {r.top_groups} do not divide "
                                  f"{self.experts} experts into groups and choose some of them")
        if self.top_k > (among := self.experts // r.groups * r.top_groups):
            raise CheckpointError(f"config.json: num_experts_per_tok cannot be more than the {among} experts that a "
                                  "token may choose from", found=self.top_k)

    def _attention(self, f: Fields) -> None:
        self.heads = f.integer("num_attention_heads")
        f.expect("num_key_value_heads", self.heads)
        f.require("q_lora_rank")  # null and absent differ: transformers reads absent as 1536
        self.q_lora = f.integer("q_lora_rank", None)
        self.kv_lora = f.integer("kv_lora_rank")
        self.nope, self.rotated = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim")
        self.v_head_dim = f.integer("v_head_dim")
        f.expect("qk_head_dim", self.nope + self.rotated)
        f.expect("head_dim", self.rotated)

    def _experts(self, f: Fields) -> None:
        self.experts = f.integer("n_routed_experts")
        self.shared = f.integer("n_shared_experts")
        self.expert_size = f.integer("moe_intermediate_size")
        self.top_k = f.integer("num_experts_per_tok")
        f.expect("moe_layer_freq", 1)
        f.expect("ep_size", 1)

    def _own(self, f: Fields) -> None:
        """What V2 and V3 call differently, or read differently."""
        self.mlp_bias = f.flag("mlp_bias", False)
        self.dense_layers = f.integer("first_k_dense_replace", 0, zero=True)
        self.interleaved, self.extra_layers, self.selection_bias = True, 0, False
        f.expect("rope_interleave", True)
        f.expect("scoring_func", "softmax")
        f.expect("norm_topk_prob", False)  # transformers ignores it
        f.expect("topk_method", "greedy", "group_limited_greedy")
        groups, top_groups = f.integer("n_group", 1), f.integer("topk_group", 1)
        grouped = f.raw.get("topk_method") == "group_limited_greedy"
        self.routing = Routing(top_k=self.top_k, scale=f.number("routed_scaling_factor", 1.0),
                               groups=groups if grouped else 1, top_groups=top_groups if grouped else 1)


class DeepseekV3Config(DeepseekV2Config):
    """V3 and R1: experts by sigmoid scores with a bias for the choice, groups by their best two."""

    def _own(self, f: Fields) -> None:
        self.mlp_bias, self.selection_bias = False, True
        self.dense_layers = f.integer("first_k_dense_replace", 3, zero=True)
        self.interleaved = f.flag("rope_interleave", True)
        self.extra_layers = f.integer("num_nextn_predict_layers", 1, zero=True)
        f.expect("scoring_func", "sigmoid")
        f.expect("topk_method", "noaux_tc")
        self.routing = Routing(
            top_k=self.top_k, score="sigmoid", renormalize=f.flag("norm_topk_prob", True),
            scale=f.number("routed_scaling_factor", 2.5), group_score="top2",
            groups=f.integer("n_group", 8), top_groups=f.integer("topk_group", 4),
        )


class DeepseekV2ForCausalLM(HubDecoderLM):
    config_class: type[DeepseekV2Config] = DeepseekV2Config

    def __init__(self, fields: Fields, make: Make) -> None:
        c = self.config_class(fields)
        super().__init__(c, make, c.rotated, lambda index, at: deepseek_layer(index, c, at))
        self.ignored_tensors = {**ROTARY_TABLES, **_prediction_layers(c, make.at("model"))}


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    config_class = DeepseekV3Config


def _prediction_layers(c: DeepseekV2Config, make: Make) -> Mapping[str, str]:
    """Layers behind the last that predict further tokens, told by their `eh_proj` from one that the config forgot."""
    extra = [c.layers + i for i in range(c.extra_layers) if make.at(f"layers.{c.layers + i}").stores("eh_proj")]
    numbers = "|".join(map(str, extra))
    return {rf"model\.layers\.({numbers})\..*": "predicts further tokens, which is not implemented"} if numbers else {}


def deepseek_layer(index: int, c: DeepseekV2Config, make: Make) -> DecoderLayer:
    dense = index < c.dense_layers
    return DecoderLayer(
        input_norm=make.norm("input_layernorm", c.hidden, c.eps),
        attn=latent_attention(index, c, make.at("self_attn")),
        post_norm=make.norm("post_attention_layernorm", c.hidden, c.eps),
        mlp=gated_mlp(c.intermediate, c, make.at("mlp")) if dense else expert_block(c, make.at("mlp")),
    )


def latent_attention(index: int, c: DeepseekV2Config, make: Make) -> LatentSelfAttention:
    q_size, tail = c.heads * (c.nope + c.rotated), ("kv_a_proj_with_mqa", c.kv_lora + c.rotated)
    up = None
    if c.q_lora is not None:
        up = LatentQuery(make.norm("q_a_layernorm", c.q_lora, LATENT_EPS), make.linear("q_b_proj", c.q_lora, q_size))
        down = make.fused([("q_a_proj", c.q_lora), tail], c.hidden, bias=c.attention_bias)
    elif c.attention_bias:  # which q_proj has not
        parts = [make.linear("q_proj", c.hidden, q_size), make.linear(tail[0], c.hidden, tail[1], bias=True)]
        down = SplitLinear(parts)
    else:
        down = make.fused([("q_proj", q_size), tail], c.hidden)
    attn = MLAAttention(
        index, make.dense("kv_b_proj", c.kv_lora, c.heads * (c.nope + c.v_head_dim)), num_heads=c.heads,
        qk_nope_head_dim=c.nope, qk_rope_head_dim=c.rotated, kv_lora_rank=c.kv_lora, v_head_dim=c.v_head_dim,
        scale=c.scale, interleaved=c.interleaved, prefix=make.prefix,
    )
    return LatentSelfAttention(
        down=down, up=up,
        kv_norm=make.norm("kv_a_layernorm", c.kv_lora, LATENT_EPS), attn=attn,
        out=make.linear("o_proj", c.heads * c.v_head_dim, c.hidden, bias=c.attention_bias),
    )


def gated_mlp(size: int, c: DeepseekV2Config, make: Make) -> nn.Module:
    return GatedMLP(make.fused([("gate_proj", size), ("up_proj", size)], c.hidden, bias=c.mlp_bias),
                    make.linear("down_proj", size, c.hidden, bias=c.mlp_bias))


def expert_block(c: DeepseekV2Config, make: Make) -> MoEBlock:
    return MoEBlock(
        make.router("gate", c.hidden, c.experts, c.routing,
                    bias="e_score_correction_bias" if c.selection_bias else None),
        make.experts("experts", c.experts, c.hidden, c.expert_size, top_k=c.top_k, parts=PARTS),
        gated_mlp(c.shared * c.expert_size, c, make.at("shared_experts")),
    )
