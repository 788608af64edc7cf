// The arguments of attention of prompts, as the binding fills them and the launcher reads them.
#pragma once

#include <cstdint>

struct PromptAttention {
  void* out;               // [T, heads, D] of q's dtype
  const void* q;           // [T, heads, D]
  const void* cache;       // [2, blocks, block_size, kv_heads, D] of q's dtype, K and V plane_bytes apart
  const int* query_start;  // [R + 1], where each request's queries begin, and T
  const int* seq_lens;     // [R], keys of each, its queries' own included; 0 is padding
  const int* block_table;  // [R, max_blocks]
  int* counter;            // 0 at first: jobs that were drawn
  int64_t q_token, q_head, plane_bytes;  // strides of q in elements
  int requests, tokens, heads, kv_heads, dim, blocks, block_size, max_blocks;
  float scale, v_scale;  // scale includes k_scale
  bool bf16;             // else float16
};
