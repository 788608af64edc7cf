// The arguments of the decode kernels, as the binding fills them and the kernels read them.
#pragma once

#include <cstdint>

struct PagedAttention {
  void* out;               // [R, heads, D] of q's dtype
  float* partial;          // v2: [R, heads, parts, D]; v1: null
  float *maxima, *sums;    // v2: [R, heads, parts], in units of log2
  const void* q;           // [R, heads, D], rows q_stride elements apart
  const void* cache;       // [2, blocks, block_size, kv_heads, D], K and V plane_bytes apart
  const int* block_table;  // [R, max_blocks]
  const int* seq_lens;     // [R]; 0 is padding
  int64_t q_stride, plane_bytes;
  int requests, heads, kv_heads, dim, block_size, max_blocks;
  int window;              // positions in sight, the query's own included; 0 sees all
  int parts, part_tokens;  // v2: of a sequence, 0 where none has a key; v1: 1, unused
  float scale, v_scale;    // scale includes k_scale
  bool bf16, fp8;          // q and out; the cache (else as q)
};
