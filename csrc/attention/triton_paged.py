"""Triton: attention of a ragged batch over paged or plain keys and values, in one pass or in splits that are merged."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early


@triton.jit
def _load(at, inside, d_in, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Without a mask where nothing needs one: masks cost registers in the inner loop."""
    if MASKED:
        if EVEN:
            return tl.load(at, mask=inside, other=0.0)
        return tl.load(at, mask=inside & d_in, other=0.0)
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=d_in, other=0.0)


@triton.jit
def _request_of(query_start_ptr, tile, requests, BLOCK_Q: tl.constexpr):
    """The request of a query tile: the tiles of request r are numbered from query_start[r] // BLOCK_Q + r on."""
    left, right = 0, requests
    while left < right:
        middle = (left + right) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= tile:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit
def query_tile(query_start_ptr, seq_len_ptr, requests, ONE_QUERY: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(request, its first query in the batch, its queries, the first of this program, its keys); nothing to do if that
    first one is not below the number of queries."""
    if ONE_QUERY:
        request = tl.program_id(0)
        begin, queries, first_query = request, 1, 0
    else:
        # The last tiles of a prompt see most keys: they go first, so that no long one is left at the end.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        request = _request_of(query_start_ptr, tile, requests, BLOCK_Q)
        begin = tl.load(query_start_ptr + request)
        queries = tl.load(query_start_ptr + request + 1) - begin
        first_query = (tile - (begin // BLOCK_Q + request)) * BLOCK_Q
    return request, begin, queries, first_query, tl.load(seq_len_ptr + request)


@triton.jit
def share_of(split, first, last, splits, MIN_SHARE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of a split: whole blocks, MIN_SHARE at least; an empty range where there is nothing left."""
    share = tl.maximum(tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N, MIN_SHARE)
    first += split * share
    return first, tl.minimum(last, first + share)


@triton.jit
def _block(
    start, last, position, q, q_tail, top, total, acc,
    k_ptr, k_tail_ptr, v_ptr, table_ptr, first_slot, k_slot, k_tail_slot, v_slot, qk_scale,
    D: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, D_PAD: tl.constexpr, TAIL_PAD: tl.constexpr,
    V_PAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One step of the online softmax (arXiv 1805.02867) over keys start..start + BLOCK_N, in base 2."""
    n = start + tl.arange(0, BLOCK_N)
    d, d_v = tl.arange(0, D_PAD), tl.arange(0, V_PAD)
    n_in = n < last
    if PAGE > 0:
        if MASKED:
            page = tl.load(table_ptr + n // PAGE, mask=n_in, other=0)
        else:
            page = tl.load(table_ptr + n // PAGE)
        slot = page.to(tl.int64) * PAGE + n % PAGE
    else:
        slot = first_slot + n
    k = _load(k_ptr + (slot * k_slot)[None, :] + d[:, None], n_in[None, :], (d < D)[:, None], MASKED, D == D_PAD)
    k = k.to(q.dtype)
    s = tl.dot(q, k, input_precision="ieee")
    if D_TAIL > 0:
        e = tl.arange(0, TAIL_PAD)
        k_tail = _load(k_tail_ptr + (slot * k_tail_slot)[None, :] + e[:, None], n_in[None, :], (e < D_TAIL)[:, None],
                       MASKED, D_TAIL == TAIL_PAD)
        s = tl.dot(q_tail, k_tail.to(q.dtype), s, input_precision="ieee")
    if MASKED:
        seen = n[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (n[None, :] > position[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * qk_scale)
    shift = higher
    if MASKED:
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: keeps -inf - -inf out
    p = tl.exp2(s * qk_scale - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(p, 1)
    v = _load(v_ptr + (slot * v_slot)[:, None] + d_v[None, :], n_in[:, None], (d_v < D_V)[None, :], MASKED,
              D_V == V_PAD).to(q.dtype)
    acc = acc * decay[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return higher, total, acc


@triton.jit
def _merged(parts_ptr, lse_ptr, row, splits, d, D_V: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """Values d of a row: its parts [splits, D_V] of a softmax by their sums; zeros where no part has any."""
    s = tl.arange(0, SPLITS_PAD)
    lse = tl.load(lse_ptr + row * splits + s, mask=s < splits, other=float("-inf"), cache_modifier=".cg")
    some = lse > float("-inf")
    top = tl.max(lse, 0)
    weight = tl.where(some, tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    parts = tl.load(parts_ptr + (row * splits + s)[:, None] * D_V + d[None, :], mask=some[:, None] & (d < D_V)[None, :],
                    other=0.0, cache_modifier=".cg")
    total = tl.sum(weight, 0)
    return tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["requests"])
def attention_kernel(
    q_ptr, q_tail_ptr, k_ptr, k_tail_ptr, v_ptr, out_ptr, lse_ptr,
    query_start_ptr, key_start_ptr, seq_len_ptr, table_ptr, requests, heads,
    q_token, q_head, q_tail_token, q_tail_head, k_slot, k_head, k_tail_slot, k_tail_head, v_slot, v_head, table_stride,
    qk_scale, v_scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr,
    D_PAD: tl.constexpr, TAIL_PAD: tl.constexpr, V_PAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    ONE_QUERY: tl.constexpr, IN_PARTS: tl.constexpr, MIN_SHARE: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):
    """Attention of BLOCK_Q queries of one request for the GROUP heads of one KV head, over one split of its keys.

    Grid: (tiles of queries, KV heads, splits), with requests tiles if ONE_QUERY (every request has one query) and
    tokens // BLOCK_Q + requests otherwise. The rows of the product are (query, head of the group) pairs. A request's
    queries are the last of its seq_len keys; key n is in slot table[n // PAGE] * PAGE + n % PAGE, or key_start + n
    with PAGE 0.

    IN_PARTS out is float32 [T, heads, splits, D_V] and lse [T, heads, splits] the base 2 logarithm of the sum
    of each part, -inf for one with nothing to do, whose out is left as it was. Each split has an equal share of the
    keys that the tile sees, MIN_SHARE at least: what a device computes of seq_len, so that a grid fits every length.
    """
    start_early(EARLY)
    kv_head, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    request, begin, queries, first_query, length = query_tile(query_start_ptr, seq_len_ptr, requests, ONE_QUERY,
                                                              BLOCK_Q)
    if first_query >= queries:
        return
    before = length - queries + first_query  # keys that came before this tile's first query

    m = tl.arange(0, BLOCK_M)
    query, head = first_query + m // GROUP, kv_head * GROUP + m % GROUP
    row_in = (m < BLOCK_Q * GROUP) & (query < queries)
    position = length - queries + query
    token = (begin + query).to(tl.int64)

    first, last = 0, tl.minimum(length, before + BLOCK_Q)
    if WINDOW > 0:
        first = tl.maximum(0, before - WINDOW + 1) // BLOCK_N * BLOCK_N
    if IN_PARTS:
        first, last = share_of(split, first, last, splits, MIN_SHARE, BLOCK_N)
        if first >= last:
            tl.store(lse_ptr + (token * heads + head) * splits + split, tl.zeros((BLOCK_M,), tl.float32) - float("inf"),
                     mask=row_in)
            return

    d, d_v = tl.arange(0, D_PAD), tl.arange(0, V_PAD)
    q_at = q_ptr + token[:, None] * q_token + head[:, None] * q_head + d[None, :]
    q = tl.load(q_at, mask=row_in[:, None] & (d < D)[None, :], other=0.0)
    q_tail = q
    if D_TAIL > 0:
        e = tl.arange(0, TAIL_PAD)
        q_at = q_tail_ptr + token[:, None] * q_tail_token + head[:, None] * q_tail_head + e[None, :]
        q_tail = tl.load(q_at, mask=row_in[:, None] & (e < D_TAIL)[None, :], other=0.0)
    if UPCAST:
        q, q_tail = q.to(tl.float32), q_tail.to(tl.float32)
    top = tl.zeros((BLOCK_M,), tl.float32) - float("inf")
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, V_PAD), tl.float32)

    k_ptr += kv_head.to(tl.int64) * k_head
    k_tail_ptr += kv_head.to(tl.int64) * k_tail_head
    v_ptr += kv_head.to(tl.int64) * v_head
    table_at = table_ptr + request.to(tl.int64) * table_stride
    first_slot = tl.zeros((1,), tl.int64)
    if PAGE == 0:
        first_slot += tl.load(key_start_ptr + request)

    # Many queries: keys that all of them see need no mask. One query: a second loop would only drain the pipeline.
    clear = first
    if not ONE_QUERY and WINDOW == 0:
        clear = first + tl.maximum(0, tl.minimum(last, before + 1) - first) // BLOCK_N * BLOCK_N
        for start in range(first, clear, BLOCK_N):
            top, total, acc = _block(
                start, last, position, q, q_tail, top, total, acc, k_ptr, k_tail_ptr, v_ptr, table_at, first_slot,
                k_slot, k_tail_slot, v_slot, qk_scale, D, D_TAIL, D_V, D_PAD, TAIL_PAD, V_PAD, PAGE, WINDOW,
                False, BLOCK_N)
    for start in range(clear, last, BLOCK_N):
        top, total, acc = _block(
            start, last, position, q, q_tail, top, total, acc, k_ptr, k_tail_ptr, v_ptr, table_at, first_slot,
            k_slot, k_tail_slot, v_slot, qk_scale, D, D_TAIL, D_V, D_PAD, TAIL_PAD, V_PAD, PAGE, WINDOW,
            True, BLOCK_N)

    out = acc * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]  # a padded row has seen nothing: zeros
    row = (token * heads + head) * splits + split
    tl.store(out_ptr + row[:, None] * D_V + d_v[None, :], out.to(out_ptr.dtype.element_ty),
             mask=row_in[:, None] & (d_v < D_V)[None, :])
    if IN_PARTS:
        tl.store(lse_ptr + row, top + tl.log2(total), mask=row_in)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    parts_ptr, lse_ptr, out_ptr, splits,
    D_V: tl.constexpr, SPLITS_PAD: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):
    """out [rows, D_V] = the parts [rows, splits, D_V] of a softmax by their sums; zeros where no part has any."""
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out = _merged(parts_ptr, lse_ptr, row, splits, d, D_V, SPLITS_PAD)
    tl.store(out_ptr + row * D_V + d, out.to(out_ptr.dtype.element_ty), mask=d < D_V)
