// torch.ops.nybble.cpu_*: the ops of the CPU library, on torch's stable ABI and torch's own threads.
#include <torch/csrc/stable/ops.h>

#include "attention/cpu_attention.h"
#include "bind_common.h"
#include "norm_rope/cpu_norm.h"

extern "C" {
int nybble_cpu_attention(const nybble::CpuAttention*);
int nybble_cpu_store_kv(const nybble::CpuStore*);
int nybble_cpu_rope_and_cache(const nybble::CpuStore*);
int nybble_cpu_rms_norm(const nybble::CpuNorm*);
int nybble_cpu_silu_mul(const nybble::CpuGate*);
}

namespace {

using namespace nybble;

void on_threads(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STD_TORCH_CHECK(torch_parallel_for(0, count, grain, body, context) == 0, "nybble: torch's threads failed");
}

CpuType type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return CPU_FLOAT32;
    case ScalarType::BFloat16: return CPU_BFLOAT16;
    case ScalarType::Half: return CPU_FLOAT16;
    default: STD_TORCH_CHECK(false, "values must be float32, bfloat16 or float16");
  }
}

// [T, heads, D] with dense rows; or [T, D] as [T, 1, D].
void check_rows(const Tensor& t, const Tensor& like, int64_t width, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 2 && t.scalar_type() == like.scalar_type() && t.numel() == t.size(0) * width, name,
                  " must be [T, ...] of ", width, " values a row and one dtype with the rest");
  int64_t dense = 1;
  for (int64_t i = t.dim() - 1; i > 0; i--) {
    STD_TORCH_CHECK(t.size(i) == 1 || t.stride(i) == dense, name, " must have dense rows");
    dense *= t.size(i);
  }
}

void check_cache(const Tensor& cache, const Tensor& values) {
  STD_TORCH_CHECK(cache.dim() == 5 && cache.size(0) == 2 && cache.is_contiguous() &&
                      cache.scalar_type() == values.scalar_type(),
                  "the cache must be dense, [2, blocks, block_size, kv_heads, D] of the values' dtype");
}

const int32_t* ints(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == count, name, " must hold ",
                  count, " int32 values");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

CpuStore store_arguments(const Tensor& cache, const Tensor& slots, int64_t tokens) {
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.is_contiguous() && slots.numel() == tokens,
                  "slots must be dense int64 [T]");
  CpuStore a{};
  a.cache = cache.mutable_data_ptr();
  a.slots = static_cast<const int64_t*>(slots.const_data_ptr());
  a.tokens = tokens;
  a.plane_size = cache.stride(0);
  a.kv_heads = static_cast<int>(cache.size(3));
  a.dim = static_cast<int>(cache.size(4));
  a.type = type_of(cache);
  a.parallel = on_threads;
  return a;
}

void cpu_store_kv(Tensor k, Tensor v, Tensor cache, Tensor slots) {
  check_cache(cache, k);
  check_rows(k, cache, cache.size(3) * cache.size(4), "k");
  check_rows(v, cache, cache.size(3) * cache.size(4), "v");
  STD_TORCH_CHECK(k.size(0) == v.size(0), "k and v must be of the same tokens");
  auto a = store_arguments(cache, slots, k.size(0));
  a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.k_stride = k.stride(0), a.v_stride = v.stride(0);
  check_built(nybble_cpu_store_kv(&a), "cpu_store_kv");
}

void cpu_rope_and_cache(Tensor q, Tensor qkv, Tensor cos, Tensor sin, Tensor cache, Tensor slots,
                        std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, double eps) {
  check_cache(cache, qkv);
  const int64_t dim = cache.size(4), heads = q.dim() == 3 ? q.size(1) : 0;
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) == dim && q.size(0) == qkv.size(0) && q.is_contiguous() && dim % 2 == 0 &&
                      q.scalar_type() == qkv.scalar_type(),
                  "q must be dense [T, heads, D] of the cache's D, which halves");
  check_rows(qkv, cache, (heads + 2 * cache.size(3)) * dim, "qkv");
  for (const Tensor* t : {&cos, &sin}) {
    check_rows(*t, cache, dim, "cos and sin");
    STD_TORCH_CHECK(t->size(0) == qkv.size(0) && t->stride(0) == cos.stride(0), "cos and sin must be of the tokens");
  }
  STD_TORCH_CHECK(q_weight.has_value() == k_weight.has_value(), "both heads' norms, or none");
  for (const auto* t : {&q_weight, &k_weight})
    STD_TORCH_CHECK(!*t || ((*t)->is_contiguous() && (*t)->numel() == dim && (*t)->scalar_type() == q.scalar_type()),
                    "the norms' weights must be dense [D]");
  auto a = store_arguments(cache, slots, qkv.size(0));
  a.q = qkv.const_data_ptr(), a.q_out = q.mutable_data_ptr();
  a.cos = cos.const_data_ptr(), a.sin = sin.const_data_ptr();
  a.q_weight = q_weight ? q_weight->const_data_ptr() : nullptr;
  a.k_weight = k_weight ? k_weight->const_data_ptr() : nullptr;
  a.q_stride = qkv.stride(0), a.cos_stride = cos.stride(0);
  a.heads = static_cast<int>(heads);
  a.eps = static_cast<float>(eps);
  check_built(nybble_cpu_rope_and_cache(&a), "cpu_rope_and_cache");
}

void cpu_attention(Tensor out, Tensor q, Tensor cache, Tensor query_start, Tensor seq_lens, Tensor block_table,
                   double scale, int64_t window) {
  check_cache(cache, q);
  const int64_t requests = seq_lens.numel(), tokens = q.size(0), block_size = cache.size(2);
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) == cache.size(4) && q.size(1) % cache.size(3) == 0,
                  "q must be [T, heads, D] of the cache's D and a multiple of its heads");
  check_rows(q, cache, q.size(1) * q.size(2), "q");
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == q.numel() && out.scalar_type() == q.scalar_type(),
                  "out must be dense, of q's shape and dtype");
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 2 &&
                      block_table.size(0) == requests && block_table.stride(1) == 1,
                  "block_table must be int32 [R, max_blocks] with dense rows");
  CpuAttention a{};
  a.query_start = ints(query_start, requests + 1, "query_start");
  a.seq_lens = ints(seq_lens, requests, "seq_lens");
  a.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  STD_TORCH_CHECK(a.query_start[0] == 0 && a.query_start[requests] == tokens, "query_start must run from 0 to T");
  for (int64_t r = 0; r < requests; r++) {
    const int64_t queries = a.query_start[r + 1] - a.query_start[r], keys = a.seq_lens[r];
    STD_TORCH_CHECK(queries >= 0 && keys <= block_table.size(1) * block_size && (keys == 0 || keys >= queries),
                    "request ", r, " has ", queries, " queries and ", keys, " keys in ", block_table.size(1),
                    " blocks");
  }
  a.out = out.mutable_data_ptr(), a.q = q.const_data_ptr(), a.cache = cache.const_data_ptr();
  a.q_stride = q.stride(0), a.plane_size = cache.stride(0), a.table_stride = block_table.stride(0);
  a.requests = static_cast<int>(requests), a.heads = static_cast<int>(q.size(1));
  a.kv_heads = static_cast<int>(cache.size(3)), a.dim = static_cast<int>(cache.size(4));
  a.block_size = static_cast<int>(block_size), a.window = static_cast<int>(window);
  a.scale = static_cast<float>(scale);
  a.type = type_of(q);
  a.parallel = on_threads;
  a.threads = static_cast<int>(torch::stable::get_num_threads());
  check_built(nybble_cpu_attention(&a), "cpu_attention");
}

void cpu_rms_norm(Tensor out, std::optional<Tensor> total, Tensor x, std::optional<Tensor> residual, Tensor weight,
                  double eps) {
  const int64_t width = weight.numel();
  STD_TORCH_CHECK(out.is_contiguous() && weight.is_contiguous() && total.has_value() == residual.has_value(),
                  "out and weight must be dense, and a residual has a sum");
  for (const Tensor* t : {&out, &x}) check_rows(*t, weight, width, "out and x");
  CpuNorm a{};
  if (residual) {
    for (const Tensor* t : {&*total, &*residual}) check_rows(*t, weight, width, "the residual and the sum");
    STD_TORCH_CHECK(total->is_contiguous() && residual->size(0) == x.size(0) && total->size(0) == x.size(0),
                    "the residual and its sum must be of x's rows, the sum dense");
    a.residual = residual->const_data_ptr(), a.total = total->mutable_data_ptr();
    a.residual_stride = residual->stride(0);
  }
  STD_TORCH_CHECK(out.size(0) == x.size(0), "out must be of x's rows");
  a.out = out.mutable_data_ptr(), a.x = x.const_data_ptr(), a.weight = weight.const_data_ptr();
  a.rows = x.size(0), a.width = width, a.x_stride = x.stride(0);
  a.eps = static_cast<float>(eps);
  a.type = type_of(x);
  a.parallel = on_threads;
  check_built(nybble_cpu_rms_norm(&a), "cpu_rms_norm");
}

void cpu_silu_mul(Tensor out, Tensor x) {
  const int64_t width = out.dim() == 2 ? out.size(1) : 0;
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == x.size(0), "out must be dense, [T, D]");
  check_rows(x, out, 2 * width, "x");
  CpuGate a{out.mutable_data_ptr(), x.const_data_ptr(), x.size(0), width, x.stride(0), type_of(x), on_threads};
  check_built(nybble_cpu_silu_mul(&a), "cpu_silu_mul");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nybble, m) {
  m.def("cpu_attention(Tensor(a!) out, Tensor q, Tensor cache, Tensor query_start, Tensor seq_lens, "
        "Tensor block_table, float scale, int window) -> ()");
  m.def("cpu_store_kv(Tensor k, Tensor v, Tensor(a!) cache, Tensor slots) -> ()");
  m.def("cpu_rope_and_cache(Tensor(a!) q, Tensor qkv, Tensor cos, Tensor sin, Tensor(b!) cache, Tensor slots, "
        "Tensor? q_weight, Tensor? k_weight, float eps) -> ()");
  m.def("cpu_rms_norm(Tensor(a!) out, Tensor(b!)? total, Tensor x, Tensor? residual, Tensor weight, float eps) -> ()");
  m.def("cpu_silu_mul(Tensor(a!) out, Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nybble, CPU, m) {
  m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  m.impl("cpu_store_kv", TORCH_BOX(&cpu_store_kv));
  m.impl("cpu_rope_and_cache", TORCH_BOX(&cpu_rope_and_cache));
  m.impl("cpu_rms_norm", TORCH_BOX(&cpu_rms_norm));
  m.impl("cpu_silu_mul", TORCH_BOX(&cpu_silu_mul));
}
