"""The demo's network for training: Mixtral in plain torch, every expert computed for every token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, one_hot, rms_norm, scaled_dot_product_attention, silu

from .checkpoint import CONFIG
from .rows import IGNORE

HIDDEN, EXPERTS = CONFIG["hidden_size"], CONFIG["num_local_experts"]
HEADS, KV_HEADS, HEAD_DIM = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
BALANCE = 0.01  # weight of the loss that keeps experts evenly used (Fedus et al., 2021)


def matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * gain / math.sqrt(shape[-1]))


class Layer(nn.Module):
    """One decoder layer: attention, then the top two of eight experts."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        quiet = 1 / math.sqrt(2 * depth)
        self.attn_norm, self.moe_norm = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.ones(HIDDEN))
        self.q, self.kv = matrix(HEADS * HEAD_DIM, HIDDEN), matrix(2 * KV_HEADS * HEAD_DIM, HIDDEN)
        self.o = matrix(HIDDEN, HEADS * HEAD_DIM, gain=quiet)
        mid = CONFIG["intermediate_size"]
        self.gate, self.w2 = matrix(EXPERTS, HIDDEN), matrix(EXPERTS, HIDDEN, mid, gain=quiet)
        self.w1, self.w3 = matrix(EXPERTS, mid, HIDDEN), matrix(EXPERTS, mid, HIDDEN)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [B, T, hidden] -> the same, and this layer's balance loss."""
        x = x + self._attend(norm(x, self.attn_norm), rope)
        y, loss = self._experts(norm(x, self.moe_norm).flatten(0, 1))
        return x + y.view_as(x), loss

    def _attend(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q = linear(x, self.q).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = linear(x, self.kv).unflatten(-1, (2 * KV_HEADS, HEAD_DIM)).transpose(1, 2).chunk(2, dim=1)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (rotate(k, *rope), v))
        out = scaled_dot_product_attention(rotate(q, *rope), k, v, is_causal=True)
        return linear(out.transpose(1, 2).flatten(2), self.o)

    def _experts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            probs = linear(x.float(), self.gate.float()).softmax(-1)
        top, chosen = probs.topk(CONFIG["num_experts_per_tok"], dim=-1)
        weights = torch.zeros_like(probs).scatter(1, chosen, top / top.sum(-1, keepdim=True))
        # All experts as one wide layer, whose columns are weighted by their expert's share of the token.
        mid = silu(linear(x, self.w1.flatten(0, 1))) * linear(x, self.w3.flatten(0, 1))
        mid = (mid.unflatten(-1, (EXPERTS, -1)) * weights.to(mid.dtype)[..., None]).flatten(1)
        y = linear(mid, self.w2.transpose(0, 1).flatten(1))
        share = one_hot(chosen, EXPERTS).sum(1).float().mean(0) / chosen.shape[1]
        return y, EXPERTS * (share * probs.mean(0)).sum()


class Network(nn.Module):
    """ids [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self) -> None:
        super().__init__()
        layers = CONFIG["num_hidden_layers"]
        self.embed, self.norm = matrix(CONFIG["vocab_size"], HIDDEN), nn.Parameter(torch.ones(HIDDEN))
        self.layers = nn.ModuleList(Layer(layers) for _ in range(layers))
        self.head = matrix(CONFIG["vocab_size"], HIDDEN)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the mean balance loss of the layers."""
        x, losses = self.embed[ids], []
        rope = rotations(ids.shape[1], ids.device)
        for layer in self.layers:
            x, loss = layer(x, rope)
            losses.append(loss)
        return linear(norm(x, self.norm), self.head), torch.stack(losses).mean()

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits, balance = self(ids)
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE) + BALANCE * balance

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights in bfloat16 under the names of Mixtral's checkpoints."""
        out: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm,
                                  "lm_head.weight": self.head}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            at = f"model.layers.{i}."
            k, v = layer.kv.chunk(2)
            out |= {at + "input_layernorm.weight": layer.attn_norm,
                    at + "post_attention_layernorm.weight": layer.moe_norm,
                    at + "self_attn.q_proj.weight": layer.q, at + "self_attn.k_proj.weight": k,
                    at + "self_attn.v_proj.weight": v, at + "self_attn.o_proj.weight": layer.o,
                    at + "block_sparse_moe.gate.weight": layer.gate}
            for e in range(EXPERTS):
                for name, stack in (("w1", layer.w1), ("w2", layer.w2), ("w3", layer.w3)):
                    out[f"{at}block_sparse_moe.experts.{e}.{name}.weight"] = stack[e]
        return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in out.items()}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x.float(), (HIDDEN,), weight.float(), CONFIG["rms_norm_eps"]).to(x.dtype)


def rotations(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of rotary positions (Su et al., 2021), halves layout."""
    inverse = CONFIG["rope_theta"] ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angles = (torch.arange(length, device=device)[:, None] * inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)
