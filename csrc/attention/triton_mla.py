"""Triton: absorbed latent attention over the paged cache, every row of which is keys and values of all heads."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early
from .triton_paged import query_tile, share_of


@triton.jit(do_not_specialize=["requests"])
def latent_attention_kernel(
    q_ptr, q_pe_ptr, rows_ptr, out_ptr, lse_ptr, query_start_ptr, seq_len_ptr, table_ptr, requests, heads,
    q_token, q_head, q_pe_token, q_pe_head, row_slot, table_stride, qk_scale, v_scale,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    PAGE: tl.constexpr, ONE_QUERY: tl.constexpr, IN_PARTS: tl.constexpr, MIN_SHARE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):
    """As `attention_kernel`, of rows [C + R] whose first C values are also the values; GROUP heads a program.

    Products are transposed, rows x queries: a row is read once into shared memory and multiplied from there in both
    of its parts, and few heads do not leave most of a tensor core's 64 rows empty.
    """
    start_early(EARLY)
    split, splits = tl.program_id(2), tl.num_programs(2)
    request, begin, queries, first_query, length = query_tile(query_start_ptr, seq_len_ptr, requests, ONE_QUERY,
                                                              BLOCK_Q)
    if first_query >= queries:
        return

    m = tl.arange(0, BLOCK_M)
    query, head = first_query + m // GROUP, tl.program_id(1) * GROUP + m % GROUP
    m_in = (m < BLOCK_Q * GROUP) & (query < queries)
    position = length - queries + query
    token = (begin + query).to(tl.int64)

    first, last = 0, tl.minimum(length, length - queries + first_query + BLOCK_Q)
    if IN_PARTS:
        first, last = share_of(split, first, last, splits, MIN_SHARE, BLOCK_N)
        if first >= last:
            tl.store(lse_ptr + (token * heads + head) * splits + split, tl.zeros((BLOCK_M,), tl.float32) - float("inf"),
                     mask=m_in)
            return

    c, r, n = tl.arange(0, C_PAD), tl.arange(0, R_PAD), tl.arange(0, BLOCK_N)
    q_at = q_ptr + token[None, :] * q_token + head[None, :] * q_head + c[:, None]
    q = tl.load(q_at, mask=m_in[None, :] & (c < C)[:, None], other=0.0)
    q_at = q_pe_ptr + token[None, :] * q_pe_token + head[None, :] * q_pe_head + r[:, None]
    q_pe = tl.load(q_at, mask=m_in[None, :] & (r < R)[:, None], other=0.0)
    if UPCAST:
        q, q_pe = q.to(tl.float32), q_pe.to(tl.float32)
    top = tl.zeros((BLOCK_M,), tl.float32) - float("inf")
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((C_PAD, BLOCK_M), tl.float32)
    table_at = table_ptr + request.to(tl.int64) * table_stride
    for start in range(first, last, BLOCK_N):
        key = start + n
        page = tl.load(table_at + key // PAGE, mask=key < last, other=0)
        row_at = rows_ptr + ((page.to(tl.int64) * PAGE + key % PAGE) * row_slot)[:, None]
        inside = (key < last)[:, None]
        if C == C_PAD:
            row = tl.load(row_at + c[None, :], mask=inside, other=0.0)
        else:
            row = tl.load(row_at + c[None, :], mask=inside & (c < C)[None, :], other=0.0)
        row_pe = tl.load(row_at + C + r[None, :], mask=inside & (r < R)[None, :], other=0.0)
        row = row.to(q.dtype)
        s = tl.dot(row, q, input_precision="ieee")
        s = tl.dot(row_pe.to(q.dtype), q_pe, s, input_precision="ieee")
        s = tl.where(key[:, None] <= position[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 0) * qk_scale)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * qk_scale - shift[None, :])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 0)
        acc = tl.dot(tl.trans(row), p.to(q.dtype), acc * decay[None, :], input_precision="ieee")
        top = higher

    out = acc * (v_scale / tl.where(total == 0.0, 1.0, total))[None, :]
    at = (token * heads + head) * splits + split
    tl.store(out_ptr + at[None, :] * C + c[:, None], out.to(out_ptr.dtype.element_ty),
             mask=m_in[None, :] & (c < C)[:, None])
    if IN_PARTS:
        tl.store(lse_ptr + at, top + tl.log2(total), mask=m_in)
