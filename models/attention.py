"""The attention layer: rotate, then hand q, k, v to whatever backend the batch carries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..csrc.norm_rope import rotary
from .base import AttentionLayer, Batch
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

    def forward(self, qkv: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """qkv [T, (num_heads + 2 num_kv_heads) * head_dim] -> [T, num_heads * head_dim]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if self.norms is not None:
            parts = zip(self.norms, qk.split((heads, kv_heads), dim=1))
            qk = torch.cat([norm(part)[0] for norm, part in parts], dim=1)
        q, k = rotary(qk, *rope).split((heads, kv_heads), dim=1)
        return batch.attn.run(self, q, k, v).flatten(-2)

    def extra_repr(self) -> str:
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{self.num_heads} heads over {self.num_kv_heads} of {self.head_dim}{window}"
