"""Writing the latent cache by Triton, with the latent's norm and the rotation of queries and key in the same launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import early
from ..norm_rope import rms_norm, rotary
from ..quantize import Rounding, code_settings, fake_quantize
from .mla_reference import write_rows

# Values of one program that rotates queries.
BLOCK_VALUES = 1024


def latent_and_cache(q: Tensor, latent: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float,
                     cache: Tensor, slots: Tensor, *, heads: int, interleaved: bool, rounding: Rounding | None = None,
                     kv_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Norm the latent, rotate its key and the queries, store latent and key, return the queries; one launch.

    Args:
        q: [T, heads (N + R)], latent: [T, C], k_pe: [T, R], rows of any stride. cos, sin: [T, 1, R] as
            `norm_rope.rotary` takes them. weight [C], eps: of the latent's RMSNorm.
        cache: [1, num_blocks, block_size, 1, C + R]; a float8_e4m3fn value is divided by `kv_scale` first. slots: [T]
            int64, a negative one is skipped.
        interleaved: values to be rotated together lie side by side; they leave as halves.
        rounding: of the normed latent, to codes and back.
    Returns:
        q_nope [T, heads, N], a view of q, and q_pe [T, heads, R], rotated.
    """
    from .triton_latent import latent_cache_kernel

    tokens, width, rotated = len(q), latent.shape[1], k_pe.shape[1]
    nope = q.shape[1] // heads - rotated
    q_pe = q.new_empty(tokens, heads, rotated)
    group = width if rounding is None or rounding.activation.group is None else rounding.activation.group
    half = _pow2(rotated // 2)
    block_h = min(max(1, BLOCK_VALUES // half), _pow2(heads))
    if tokens:
        static = q if rounding is None or rounding.static_scale is None else rounding.static_scale
        latent_cache_kernel[(tokens, 1 + -(-heads // block_h))](
            q, latent, k_pe, cos, sin, weight, static, q_pe, cache, slots, q.stride(0), latent.stride(0),
            k_pe.stride(0), cos.stride(0), cache.stride(2), eps, kv_scale, HEADS=heads, N=nope, R=rotated, C=width,
            INTERLEAVED=interleaved, QUANTIZE=rounding is not None, FP8=cache.dtype == torch.float8_e4m3fn,
            FINITE=torch.finfo(q.dtype).max, ROWS=_pow2(-(-width // group)), BLOCK=_pow2(group), GROUP=group,
            HALF_PAD=half, BLOCK_H=block_h, **early(q.device),
            **code_settings(None if rounding is None else rounding.activation))
    return q.unflatten(-1, (heads, -1))[..., :nope], q_pe


def latent_and_cache_reference(q: Tensor, latent: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor, weight: Tensor,
                               eps: float, cache: Tensor, slots: Tensor, *, heads: int, interleaved: bool,
                               rounding: Rounding | None = None, kv_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`latent_and_cache` in plain torch, step by step."""
    latent, kept = rms_norm(latent, weight, eps)[0], slots >= 0
    if rounding is not None:
        latent = fake_quantize(latent, *rounding)
    q_nope, q_pe, k_pe = rotate_latent(q, k_pe, cos, sin, heads=heads, interleaved=interleaved)
    write_rows(cache, torch.cat((latent, k_pe), dim=-1)[kept], slots[kept], scale=kv_scale)
    return q_nope, q_pe


def rotate_latent(q: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor, *, heads: int,
                  interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, heads (N + R)] and k_pe [T, R] -> q_nope [T, heads, N], and rotated q_pe [T, heads, R] and k_pe [T, R]."""
    rotated = k_pe.shape[1]
    q_nope, q_pe = q.unflatten(-1, (heads, -1)).split((q.shape[1] // heads - rotated, rotated), -1)
    pe = torch.cat((q_pe, k_pe[:, None]), dim=1)
    if interleaved:
        pe = pe.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    q_pe, k_pe = rotary(pe, cos, sin).split((heads, 1), dim=1)
    return q_nope, q_pe, k_pe[:, 0]


def _pow2(value: int) -> int:
    return 1 << (value - 1).bit_length()
