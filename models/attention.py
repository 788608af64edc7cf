"""The attention layer: rotate, then hand q, k, v to whatever backend the batch carries."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..csrc.norm_rope import rotary
from ..quant import KVScales, Slot
from .base import Batch


class AttentionLayer(nn.Module):
    """What the cache and a backend know of any attention layer.

    Attributes:
        index: which layer's cache.
        num_heads, head_dim: of the queries as they meet the keys; `scale` multiplies their products.
        kv_shape: (planes, heads, width), the values kept per token: (2, kv_heads, head_dim) for K and V.
        kv_lora_rank: width of the latent that K and V are made of (multi-head latent attention, `run_latent`), at the
            front of the one plane; None when K and V themselves are kept (`run`).
        sliding_window: a query sees that many positions, itself included; None sees all.
        k_scale, v_scale: for an FP8 cache, 1.0 where the checkpoint stores none (a cached value times its scale is
            the value).

    Args:
        prefix: the layer's name in the checkpoint ("model.layers.0.self_attn"), where those scales are looked for.
    """

    kv_lora_rank: int | None = None
    sliding_window: int | None = None

    def __init__(self, index: int, *, num_heads: int, head_dim: int, kv_shape: tuple[int, int, int],
                 scale: float | None, prefix: str | None) -> None:
        super().__init__()
        self.index, self.num_heads, self.head_dim, self.kv_shape = index, num_heads, head_dim, kv_shape
        self.scale = head_dim**-0.5 if scale is None else scale
        self.k_scale = self.v_scale = 1.0
        self._stored_scales = None if prefix is None else KVScales(prefix)

    @property
    def num_kv_heads(self) -> int:
        return self.kv_shape[1]

    def slots(self) -> Iterator[Slot]:
        if self._stored_scales is not None:
            yield from self._stored_scales.slots()

    def after_load(self) -> bool:
        """Take over the cache's scales; whether there are any. Raises CheckpointError for ones that cannot be meant."""
        scales = None if self._stored_scales is None else self._stored_scales.read()
        if scales is not None:
            self.k_scale, self.v_scale = scales
        return scales is not None


class Attention(AttentionLayer):
    """Grouped-query attention of one layer over the paged KV cache, projections excluded."""

    def __init__(self, index: int, *, num_heads: int, num_kv_heads: int, head_dim: int, scale: float | None = None,
                 sliding_window: int | None = None, prefix: str | None = None) -> None:
        super().__init__(index, num_heads=num_heads, head_dim=head_dim, kv_shape=(2, num_kv_heads, head_dim),
                         scale=scale, prefix=prefix)
        self.sliding_window = sliding_window

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
