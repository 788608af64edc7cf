// Arguments of the CPU's attention kernels, shared by their sources and the binding.
#pragma once

#include <cstdint>

#include "cpu_threads.h"
#include "cpu_type.h"

namespace nybble {

// One call over T tokens of R requests. q [T, heads, dim] with rows q_stride apart, out dense, both of `type` as the
// cache [2, blocks, block_size, kv_heads, dim]; plane_size and strides in values.
struct CpuAttention {
  void* out;
  const void* q;
  const void* cache;
  const int32_t* query_start;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t q_stride, plane_size, table_stride;
  int requests, heads, kv_heads, dim, block_size;
  int window;  // 0: none
  float scale;
  CpuType type;
  Parallel parallel;
  int threads;
};

// Storing new tokens. With `cos` the first `heads` of a row's heads are queries, which go to q rotated, the next
// `kv_heads` are keys, rotated on their way to the cache, and the last are values; else k and v are given apart.
struct CpuStore {
  const void* k;
  const void* v;
  void* cache;
  const int64_t* slots;
  int64_t tokens, k_stride, v_stride, plane_size;
  int kv_heads, dim;
  CpuType type;
  Parallel parallel;
  // of the rotation
  const void* q;
  void* q_out;
  const void* cos;
  const void* sin;
  const void* q_weight;  // of the heads' norms; null: none
  const void* k_weight;
  int64_t q_stride, cos_stride;
  int heads;
  float eps;
};

}  // namespace nybble
