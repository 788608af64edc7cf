// torch.ops.nybble.*: the ops of the plain library, on torch's stable ABI. Outputs and workspaces are arguments:
// nothing is allocated here, so every op can be captured in a CUDA graph.
#include "bind.h"

#include "attention/paged_attention.h"

extern "C" {
int nybble_paged_attention_v1(const PagedAttention*, cudaStream_t);
int nybble_paged_attention_v2(const PagedAttention*, cudaStream_t);
int nybble_reshape_and_cache(const void* k, const void* v, void* cache, const int64_t* slots, int64_t tokens,
                             int64_t k_stride, int64_t v_stride, int64_t plane_bytes, int width, float k_scale,
                             float v_scale, bool bf16, bool fp8, cudaStream_t);
}

namespace {

using namespace nybble;

bool is_bf16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }
bool is_fp8(const Tensor& t) { return t.scalar_type() == ScalarType::Float8_e4m3fn; }
int64_t plane_bytes(const Tensor& cache) { return cache.stride(0) * static_cast<int64_t>(cache.element_size()); }

void check_cache(const Tensor& cache, const Tensor& values) {
  STD_TORCH_CHECK(is_bf16(values) || values.scalar_type() == ScalarType::Half, "values must be float16 or bfloat16");
  STD_TORCH_CHECK(cache.dim() == 5 && cache.size(0) == 2 && cache.is_contiguous(),
                  "the cache must be dense, [2, blocks, block_size, kv_heads, D]");
  STD_TORCH_CHECK((cache.size(2) & (cache.size(2) - 1)) == 0, "a block must be a power of two of tokens");
  STD_TORCH_CHECK(is_fp8(cache) || cache.scalar_type() == values.scalar_type(),
                  "the cache must be float8_e4m3fn or of the values' dtype");
}

PagedAttention arguments(const Tensor& out, const Tensor& q, const Tensor& cache, const Tensor& block_table,
                         const Tensor& seq_lens, double scale, int64_t window, double k_scale, double v_scale) {
  check_cache(cache, q);
  STD_TORCH_CHECK(q.dim() == 3 && q.stride(1) == q.size(2) && q.stride(2) == 1 && q.stride(0) % 8 == 0,
                  "q must be [R, heads, D] with dense rows");
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == q.numel() && out.scalar_type() == q.scalar_type(),
                  "out must be dense, of q's shape and dtype");
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 2 &&
                      block_table.stride(1) == 1 && block_table.size(0) >= q.size(0),
                  "block_table must be int32 [R, max_blocks] with dense rows");
  STD_TORCH_CHECK(seq_lens.scalar_type() == ScalarType::Int && seq_lens.is_contiguous() &&
                      seq_lens.numel() >= q.size(0),
                  "seq_lens must be dense int32 [R]");
  STD_TORCH_CHECK(cache.size(4) == q.size(2) && q.size(1) % cache.size(3) == 0,
                  "the cache's heads must be of q's width and divide its heads");
  PagedAttention a{};
  a.out = out.mutable_data_ptr();
  a.q = q.const_data_ptr();
  a.cache = cache.const_data_ptr();
  a.block_table = static_cast<const int*>(block_table.const_data_ptr());
  a.seq_lens = static_cast<const int*>(seq_lens.const_data_ptr());
  a.q_stride = q.stride(0);
  a.plane_bytes = plane_bytes(cache);
  a.requests = static_cast<int>(q.size(0));
  a.heads = static_cast<int>(q.size(1));
  a.dim = static_cast<int>(q.size(2));
  a.block_size = static_cast<int>(cache.size(2));
  a.kv_heads = static_cast<int>(cache.size(3));
  a.max_blocks = static_cast<int>(block_table.stride(0));
  a.window = static_cast<int>(window);
  a.parts = 1;
  a.scale = static_cast<float>(scale * k_scale);
  a.v_scale = static_cast<float>(v_scale);
  a.bf16 = is_bf16(q);
  a.fp8 = is_fp8(cache);
  return a;
}

void paged_attention_v1(Tensor out, Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, double scale,
                        int64_t window, double k_scale, double v_scale) {
  const auto a = arguments(out, q, cache, block_table, seq_lens, scale, window, k_scale, v_scale);
  check(nybble_paged_attention_v1(&a, stream_of(q)), "paged_attention_v1");
}

void paged_attention_v2(Tensor out, Tensor partial, Tensor maxima, Tensor sums, Tensor q, Tensor cache,
                        Tensor block_table, Tensor seq_lens, double scale, int64_t window, double k_scale,
                        double v_scale, int64_t part_tokens) {
  const int64_t parts = maxima.size(2);
  STD_TORCH_CHECK(part_tokens > 0 && part_tokens % 16 == 0, "a partition must be a multiple of 16 tokens");
  for (const Tensor* t : {&partial, &maxima, &sums})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                        t->numel() >= q.size(0) * q.size(1) * parts * (t == &partial ? q.size(2) : 1),
                    "workspaces must be dense float32 [R, heads, parts(, D)]");
  auto a = arguments(out, q, cache, block_table, seq_lens, scale, window, k_scale, v_scale);
  a.partial = static_cast<float*>(partial.mutable_data_ptr());
  a.maxima = static_cast<float*>(maxima.mutable_data_ptr());
  a.sums = static_cast<float*>(sums.mutable_data_ptr());
  a.parts = static_cast<int>(parts);
  a.part_tokens = static_cast<int>(part_tokens);
  check(nybble_paged_attention_v2(&a, stream_of(q)), "paged_attention_v2");
}

void reshape_and_cache(Tensor k, Tensor v, Tensor cache, Tensor slots, double k_scale, double v_scale) {
  check_cache(cache, k);
  for (const Tensor* t : {&k, &v})
    STD_TORCH_CHECK(t->dim() == 3 && t->size(0) >= slots.numel() && t->size(1) == cache.size(3) &&
                        t->size(2) == cache.size(4) && t->stride(1) == t->size(2) && t->stride(2) == 1 &&
                        t->stride(0) % 8 == 0 && t->scalar_type() == k.scalar_type(),
                    "k and v must be [T, kv_heads, D] as the cache has them, with dense rows");
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.is_contiguous(), "slots must be dense int64 [T]");
  check(nybble_reshape_and_cache(k.const_data_ptr(), v.const_data_ptr(), cache.mutable_data_ptr(),
                                 static_cast<const int64_t*>(slots.const_data_ptr()), slots.size(0), k.stride(0),
                                 v.stride(0), plane_bytes(cache), static_cast<int>(k.size(1) * k.size(2)),
                                 static_cast<float>(k_scale), static_cast<float>(v_scale), is_bf16(k), is_fp8(cache),
                                 stream_of(k)),
        "reshape_and_cache");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nybble, m) {
  m.def(
      "paged_attention_v1(Tensor(a!) out, Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, float scale, "
      "int window, float k_scale, float v_scale) -> ()");
  m.def(
      "paged_attention_v2(Tensor(a!) out, Tensor(b!) partial, Tensor(c!) maxima, Tensor(d!) sums, Tensor q, "
      "Tensor cache, Tensor block_table, Tensor seq_lens, float scale, int window, float k_scale, float v_scale, "
      "int part_tokens) -> ()");
  m.def(
      "reshape_and_cache(Tensor k, Tensor v, Tensor(a!) cache, Tensor slots, float k_scale, float v_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nybble, CUDA, m) {
  m.impl("paged_attention_v1", TORCH_BOX(&paged_attention_v1));
  m.impl("paged_attention_v2", TORCH_BOX(&paged_attention_v2));
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
}
