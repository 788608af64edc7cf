"""Multi-head latent attention (arXiv 2405.04434): one small row per token is cached, keys and values are made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..csrc.attention import rotate_latent
from ..csrc.launch import lacks_fp8
from ..csrc.quantize import Quantized, Rounding, fake_quantize
from ..quant import Linear, shared_rounding
from .base import AttentionLayer, Batch, FusedAttentionRun
from .layers import RMSNorm
from .rope import RopeConfig, yarn_mscale


class MLAAttention(AttentionLayer):
    """Latent attention of one layer over the paged cache, with the matrix that makes keys and values of a latent.

    Attributes that a backend reads besides AttentionLayer's: `qk_nope_head_dim` N, `qk_rope_head_dim` R,
    `kv_lora_rank` C, `v_head_dim` V, and from after_load on `w_kv` [H, N + V, C] with its parts `w_uk` [H, N, C] and
    `w_uv` [H, V, C], in the model's dtype, and `latent_rounding`, how a latent is rounded before it is cached.
    Cached is one row of C + R values per token.

    Args:
        kv_b: C -> H (N + V), each head's N before its V. Taken over by `after_load`: it keeps nothing.
        interleaved: rotated values are stored as neighbouring pairs, not as halves.
    """

    kv_lora_rank: int

    def __init__(self, index: int, kv_b: Linear, *, num_heads: int, qk_nope_head_dim: int, qk_rope_head_dim: int,
                 kv_lora_rank: int, v_head_dim: int, scale: float, interleaved: bool = True,
                 prefix: str | None = None) -> None:
        super().__init__(index, num_heads=num_heads, head_dim=qk_nope_head_dim + qk_rope_head_dim,
                         kv_shape=(1, 1, kv_lora_rank + qk_rope_head_dim), scale=scale, prefix=prefix)
        self.kv_b, self.interleaved = kv_b, interleaved
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.kv_lora_rank, self.v_head_dim = kv_lora_rank, v_head_dim
        self.w_kv = self.w_uk = self.w_uv = torch.empty(0)
        self.latent_rounding: Rounding | None = None
        self._in_one_launch = True

    def after_load(self) -> bool:
        self.kv_b.check()
        method, weights = self.kv_b.method, self.kv_b.weights
        if (codes := method.matrix(weights)) is not None and codes.scheme.activation is not None:
            self.latent_rounding = Rounding(codes.scheme.activation, codes.input_scale)
            self._in_one_launch = codes.scheme.activation.dtype == "int8" or not lacks_fp8(self.kv_b.device)
        matrix = method.dequant(weights).to(self.kv_b.dtype)
        self.kv_b.owner = "absorbed"
        self.kv_b.release(matrix.nbytes)
        self.w_kv = matrix.view(self.num_heads, -1, self.kv_lora_rank)
        self.w_uk, self.w_uv = self.w_kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=1)
        return super().after_load()

    def forward(self, q: Tensor, latent: Tensor, k_pe: Tensor, rope: tuple[Tensor, Tensor], batch: Batch,
                norm: RMSNorm | None = None) -> Tensor:
        """q [T, H (N + R)], latent [T, C] that `norm` is still to be taken of, k_pe [T, R] not yet rotated -> [T, H V].

        A format that rounds the input of kv_b rounds the latent once, before it is cached: what kv_b would see of it,
        whichever way attention is then computed.
        """
        if norm is not None:
            if self._in_one_launch and isinstance(batch.attn, FusedAttentionRun):
                return batch.attn.run_q_latent(self, q, latent, k_pe, rope, norm.weight, norm.eps).flatten(-2)
            latent = norm(latent)[0]
        q_nope, q_pe, k_pe = rotate_latent(q, k_pe, *rope, heads=self.num_heads, interleaved=self.interleaved)
        if self.latent_rounding is not None:
            latent = fake_quantize(latent, *self.latent_rounding)
        rows = torch.cat((latent, k_pe), dim=-1)
        return batch.attn.run_latent(self, q_nope, q_pe, rows).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim} over rows of {self.kv_shape[2]}"


class LatentQuery(nn.Module):
    """A latent query's norm, then the product that makes queries of it."""

    def __init__(self, norm: RMSNorm, project: nn.Module) -> None:
        super().__init__()
        self.norm, self.project = norm, project

    def connect(self) -> None:
        self.norm.feed(self.project)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.norm(x)[0])


class LatentSelfAttention(nn.Module):
    """Projection to query, latent and key, attention, output projection.

    Args:
        down: hidden -> (queries, latent, k_pe), or (latent query, latent, k_pe) where there is `up`.
        up: latent query -> queries.
    """

    def __init__(self, *, down: nn.Module, up: LatentQuery | None, kv_norm: RMSNorm, attn: MLAAttention,
                 out: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.kv_norm, self.attn, self.out = down, up, kv_norm, attn, out

    @property
    def rounding(self) -> Rounding | None:
        return shared_rounding([self.down])

    def forward(self, x: Tensor | Quantized, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        tail, down = (self.attn.kv_lora_rank, self.attn.qk_rope_head_dim), self.down(x)
        q, latent, k_pe = down.split((down.shape[-1] - sum(tail), *tail), dim=-1)
        if self.up is not None:
            q = self.up(q)
        return self.out(self.attn(q, latent, k_pe, rope, batch, norm=self.kv_norm))


def softmax_scale(rope: RopeConfig, head_dim: int) -> float:
    """head_dim^-0.5, times the square of YaRN's temperature where `mscale_all_dim` asks for it."""
    over_all = rope.params.get("mscale_all_dim")
    return head_dim**-0.5 * (yarn_mscale(rope.params["factor"], over_all) ** 2 if over_all else 1.0)
