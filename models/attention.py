"""The attention layer: rotate, then hand q, k, v to whatever backend the batch carries."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..csrc.norm_rope import rotary
from ..quant import KVScales, Slot
from .base import Batch


class Attention(nn.Module):
    """Grouped-query attention of one layer over the paged KV cache, projections excluded.

    Attributes that a backend reads: `index` (which layer's cache), `num_heads`, `num_kv_heads`, `head_dim`, `scale`,
    `sliding_window` (a query sees that many positions, itself included; None sees all); and for an FP8 cache
    `k_scale` and `v_scale`, 1.0 where the checkpoint stores none (a cached value times its scale is the value).

    Args:
        prefix: the layer's name in the checkpoint ("model.layers.0.self_attn"), where those scales are looked for.
    """

    def __init__(self, index: int, *, num_heads: int, num_kv_heads: int, head_dim: int, scale: float | None = None,
                 sliding_window: int | None = None, prefix: str | None = None) -> None:
        super().__init__()
        self.index, self.num_heads, self.num_kv_heads, self.head_dim = index, num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.sliding_window = sliding_window
        self.k_scale = self.v_scale = 1.0
        self._stored_scales = None if prefix is None else KVScales(prefix)

    def slots(self) -> Iterator[Slot]:
        if self._stored_scales is not None:
            yield from self._stored_scales.slots()

    def after_load(self) -> bool:
        """Take over the cache's scales; whether there are any. Raises CheckpointError for ones that cannot be meant."""
        scales = None if self._stored_scales is None else self._stored_scales.read()
        if scales is not None:
            self.k_scale, self.v_scale = scales
        return scales is not None

    def forward(self, qkv: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """qkv [T, (num_heads + 2 num_kv_heads) * head_dim] -> [T, num_heads * head_dim]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        q, k = rotary(qk, *rope).split((heads, kv_heads), dim=1)
        return batch.attn.run(self, q, k, v).flatten(-2)

    def extra_repr(self) -> str:
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{self.num_heads} heads over {self.num_kv_heads} of {self.head_dim}{window}"
