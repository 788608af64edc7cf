"""The attention layer: rotate, then hand q, k, v to whatever backend the batch carries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..csrc.attention import HeadNorms
from ..csrc.norm_rope import rms_norm, rotary
from .base import AttentionLayer, Batch, FusedAttentionRun
from .layers import RMSNorm


class Attention(AttentionLayer):
    """Grouped-query attention of one layer over the paged KV cache, projections excluded.

    `norms` are those of each head's query and key, [head_dim] wide, before they are rotated (as in Qwen3).
    """

    def __init__(self, index: int, *, num_heads: int, num_kv_heads: int, head_dim: int, scale: float | None = None,
                 sliding_window: int | None = None, prefix: str | None = None,
                 norms: tuple[RMSNorm, RMSNorm] | None = None) -> None:
        super().__init__(index, num_heads=num_heads, head_dim=head_dim, kv_shape=(2, num_kv_heads, head_dim),
                         scale=scale, prefix=prefix)
        self.sliding_window = sliding_window
        self.norms = None if norms is None else nn.ModuleList(norms)
        self.head_norms: HeadNorms | None = None
        if norms is not None:
            query, key = norms
            assert query.eps == key.eps
            self.head_norms = HeadNorms(query.weight, key.weight, query.eps)

    def forward(self, qkv: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """qkv [T, (num_heads + 2 num_kv_heads) * head_dim] -> [T, num_heads * head_dim]."""
        if isinstance(batch.attn, FusedAttentionRun):
            return batch.attn.run_qkv(self, qkv, rope, self.head_norms).flatten(-2)
        heads, kv_heads, norms = self.num_heads, self.num_kv_heads, self.head_norms
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if norms is not None:
            q, k = qk.split((heads, kv_heads), dim=1)
            qk = torch.cat((rms_norm(q, norms.query, norms.eps)[0], rms_norm(k, norms.key, norms.eps)[0]), dim=1)
        q, k = rotary(qk, *rope).split((heads, kv_heads), dim=1)
        return batch.attn.run(self, q, k, v).flatten(-2)

    def extra_repr(self) -> str:
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{self.num_heads} heads over {self.num_kv_heads} of {self.head_dim}{window}"
