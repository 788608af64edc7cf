// torch.ops.nybble.*: the ops of the plain library, on torch's stable ABI. Outputs and workspaces are arguments:
// nothing is allocated here, so every op can be captured in a CUDA graph.
#include "bind.h"

#include "attention/paged_attention.h"
#include "attention/prompt_attention.h"

extern "C" {
int nybble_fp8_few_rows(void* out, const void* x, const void* w, const float* x_scale, const float* w_scale,
                        const void* bias, int m, int n, int k, int per_token, int per_channel, int half, cudaStream_t);
int nybble_fp8_few_rows_rounding(void* out, const void* x, const void* w, const float* static_scale,
                                 const float* w_scale, const void* bias, int m, int n, int k, int per_channel, int half,
                                 cudaStream_t);
int nybble_w4_few_rows(void* out, const void* x, const void* codes, const void* scales, const void* zeros,
                       const void* bias, int m, int n, int k, int blocks, int blocks_per_group, int zero, int half,
                       int scale_type, cudaStream_t);
int nybble_w4_mid_rows(void* out, const void* x, const void* codes, const void* scales, const void* zeros,
                       const void* bias, int m, int n, int k, int blocks, int blocks_per_group, int zero, int splits,
                       int half, int scale_type, cudaStream_t);
int nybble_w4_experts(void* out, const void* x, const int* slots, const int* tile_experts, const void* codes,
                      const void* scales, const void* zeros, const void* up_codes, const void* up_scales,
                      const void* up_zeros, int tiles, int tile_slots, int most, int rows_per_slot, int n, int k,
                      int blocks, int blocks_per_group, int zero, int64_t code_bytes, int64_t table, int half,
                      int scale_type, cudaStream_t);
int nybble_silu_mul_fp8(void* codes, float* scales, const void* x, const float* static_scale, int64_t x_row, int rows,
                        int width, int half, cudaStream_t);
int nybble_paged_attention_v1(const PagedAttention*, cudaStream_t);
int nybble_paged_attention_v2(const PagedAttention*, cudaStream_t);
int nybble_prompt_attention(const PromptAttention*, cudaStream_t);
int nybble_reshape_and_cache(const void* k, const void* v, void* cache, const int64_t* slots, int64_t tokens,
                             int64_t k_stride, int64_t v_stride, int64_t plane_bytes, int width, float k_scale,
                             float v_scale, bool bf16, bool fp8, cudaStream_t);
}

namespace {

using namespace nybble;

bool is_bf16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }
bool is_fp8(const Tensor& t) { return t.scalar_type() == ScalarType::Float8_e4m3fn; }
int scale_type(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Half || is_bf16(t),
                  "scales must be float32, float16 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? 0 : is_bf16(t) ? 2 : 1;
}
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

void prompt_attention(Tensor out, Tensor counter, Tensor q, Tensor cache, Tensor query_start, Tensor seq_lens,
                      Tensor block_table, double scale, double v_scale) {
  check_cache(cache, q);
  const int64_t requests = seq_lens.numel(), width = q.size(2);
  auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; };
  STD_TORCH_CHECK(q.dim() == 3 && q.stride(2) == 1 && q.stride(0) % 8 == 0 && q.stride(1) % 8 == 0 && aligned(q) &&
                      aligned(cache) && cache.scalar_type() == q.scalar_type(),
                  "q must be [T, heads, D] of the cache's dtype, its rows and the cache 16-byte aligned");
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == q.numel() && out.scalar_type() == q.scalar_type(),
                  "out must be dense, of q's shape and dtype");
  STD_TORCH_CHECK((width == 64 || width == 128) && cache.size(4) == width && q.size(1) % cache.size(3) == 0 &&
                      q.size(1) / cache.size(3) <= 128 && cache.size(2) >= 8 && cache.size(2) <= 128,
                  "heads must be of 64 or 128 values, up to 128 to a head of the cache, blocks of 8 to 128 tokens");
  for (const Tensor* t : {&query_start, &seq_lens})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() &&
                        t->numel() == requests + (t == &query_start),
                    "query_start and seq_lens must be dense int32 [R + 1] and [R]");
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 2 &&
                      block_table.stride(1) == 1 && block_table.size(0) == requests,
                  "block_table must be int32 [R, max_blocks] with dense rows");
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Int && counter.numel() == 1,
                  "counter must be int32 [1]");
  PromptAttention a{};
  a.counter = static_cast<int*>(counter.mutable_data_ptr());
  a.out = out.mutable_data_ptr();
  a.q = q.const_data_ptr();
  a.cache = cache.const_data_ptr();
  a.query_start = static_cast<const int*>(query_start.const_data_ptr());
  a.seq_lens = static_cast<const int*>(seq_lens.const_data_ptr());
  a.block_table = static_cast<const int*>(block_table.const_data_ptr());
  a.q_token = q.stride(0);
  a.q_head = q.stride(1);
  a.plane_bytes = plane_bytes(cache);
  a.requests = static_cast<int>(requests);
  a.tokens = static_cast<int>(q.size(0));
  a.heads = static_cast<int>(q.size(1));
  a.kv_heads = static_cast<int>(cache.size(3));
  a.dim = static_cast<int>(width);
  a.blocks = static_cast<int>(cache.size(1));
  a.block_size = static_cast<int>(cache.size(2));
  a.max_blocks = static_cast<int>(block_table.stride(0));
  a.scale = static_cast<float>(scale);
  a.v_scale = static_cast<float>(v_scale);
  a.bf16 = is_bf16(q);
  check(nybble_prompt_attention(&a, stream_of(q)), "prompt_attention");
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

void fp8_few_rows(Tensor out, Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, std::optional<Tensor> bias) {
  check_product(out, x, w, bias);
  int64_t m = x.size(0), n = w.size(0), x_count = x_scale.numel() == 1 ? 1 : m, w_count = w_scale.numel() == 1 ? 1 : n;
  check(nybble_fp8_few_rows(out.mutable_data_ptr(), x.const_data_ptr(), w.const_data_ptr(),
                            floats(x_scale, x_count, "x_scale"), floats(w_scale, w_count, "w_scale"),
                            bias ? bias->const_data_ptr() : nullptr, static_cast<int>(m), static_cast<int>(n),
                            static_cast<int>(x.size(1)), x_count != 1, w_count != 1,
                            out.scalar_type() == ScalarType::Half, stream_of(out)),
        "fp8_few_rows");
}

void fp8_few_rows_rounding(Tensor out, Tensor x, Tensor w, std::optional<Tensor> static_scale, Tensor w_scale,
                           std::optional<Tensor> bias) {
  int64_t m = x.size(0), n = w.size(0), w_count = w_scale.numel() == 1 ? 1 : n;
  check_codes(w, 2, "w");
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Half, "x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(1) == w.size(1) && out.dim() == 2 &&
                      out.is_contiguous() && out.size(0) == m && out.size(1) == n &&
                      out.scalar_type() == x.scalar_type(),
                  "out [M, N] = x [M, K] w [N, K]^T must be dense, x and out of one dtype");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == out.scalar_type() && bias->numel() == n && bias->is_contiguous()),
                  "bias must be [N] of out's dtype");
  check(nybble_fp8_few_rows_rounding(out.mutable_data_ptr(), x.const_data_ptr(), w.const_data_ptr(),
                                     static_scale ? floats(*static_scale, 1, "static_scale") : nullptr,
                                     floats(w_scale, w_count, "w_scale"), bias ? bias->const_data_ptr() : nullptr,
                                     static_cast<int>(m), static_cast<int>(n), static_cast<int>(x.size(1)),
                                     w_count != 1, !is_bf16(x), stream_of(out)),
        "fp8_few_rows_rounding");
}

void silu_mul_fp8(Tensor codes, Tensor scales, Tensor x, std::optional<Tensor> static_scale) {
  check_codes(codes, 2, "codes");
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Half, "x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == codes.size(0) && x.size(1) == 2 * codes.size(1) && x.stride(1) == 1,
                  "x must be [T, 2 D], codes [T, D], rows dense");
  floats(scales, codes.size(0), "scales");
  check(nybble_silu_mul_fp8(codes.mutable_data_ptr(), static_cast<float*>(scales.mutable_data_ptr()),
                            x.const_data_ptr(), static_scale ? floats(*static_scale, 1, "static_scale") : nullptr,
                            x.stride(0), static_cast<int>(x.size(0)), static_cast<int>(codes.size(1)), !is_bf16(x),
                            stream_of(x)),
        "silu_mul_fp8");
}

// Of out [M, N] = x [M, K] W^T by 4-bit codes.
void check_w4_product(const Tensor& out, const Tensor& x, const Tensor& codes, const Tensor& scales,
                      const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, int64_t blocks_per_group,
                      int64_t zero) {
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Half, "x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && out.dim() == 2 && out.is_contiguous() &&
                      out.scalar_type() == x.scalar_type() && out.size(0) == x.size(0),
                  "x [M, K] and out [M, N] must be dense and of one dtype");
  STD_TORCH_CHECK(zero >= 0, "zero must not be negative");
  int64_t n = out.size(1), blocks = codes.size(1);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.is_contiguous() && codes.dim() == 4 &&
                      codes.size(0) == (n + 63) / 64 && codes.size(2) == 64 && codes.size(3) == 64,
                  "codes must be dense int8 [ceil(N / 64), blocks, 64, 64]");
  int64_t groups = blocks_per_group ? (blocks + blocks_per_group - 1) / blocks_per_group : 1;
  STD_TORCH_CHECK(scales.is_contiguous() && scales.numel() == groups * n, "scales must be dense [groups, N]");
  STD_TORCH_CHECK(!zeros || (zeros->scalar_type() == ScalarType::Char && zeros->is_contiguous() &&
                             zeros->numel() == groups * n),
                  "zeros must be dense int8 [groups, N]");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == n && bias->is_contiguous()),
                  "bias must be [N] of x's dtype");
}

void w4_few_rows(Tensor out, Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                 std::optional<Tensor> bias, int64_t blocks_per_group, int64_t zero) {
  check_w4_product(out, x, codes, scales, zeros, bias, blocks_per_group, zero);
  check(nybble_w4_few_rows(out.mutable_data_ptr(), x.const_data_ptr(), codes.const_data_ptr(), scales.const_data_ptr(),
                           zeros ? zeros->const_data_ptr() : nullptr, bias ? bias->const_data_ptr() : nullptr,
                           static_cast<int>(x.size(0)), static_cast<int>(out.size(1)), static_cast<int>(x.size(1)),
                           static_cast<int>(codes.size(1)), static_cast<int>(blocks_per_group), static_cast<int>(zero),
                           !is_bf16(x), scale_type(scales), stream_of(out)),
        "w4_few_rows");
}

void w4_mid_rows(Tensor out, Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                 std::optional<Tensor> bias, int64_t blocks_per_group, int64_t zero, int64_t splits) {
  check_w4_product(out, x, codes, scales, zeros, bias, blocks_per_group, zero);
  check(nybble_w4_mid_rows(out.mutable_data_ptr(), x.const_data_ptr(), codes.const_data_ptr(), scales.const_data_ptr(),
                           zeros ? zeros->const_data_ptr() : nullptr, bias ? bias->const_data_ptr() : nullptr,
                           static_cast<int>(x.size(0)), static_cast<int>(out.size(1)), static_cast<int>(x.size(1)),
                           static_cast<int>(codes.size(1)), static_cast<int>(blocks_per_group), static_cast<int>(zero),
                           static_cast<int>(splits), !is_bf16(x), scale_type(scales), stream_of(out)),
        "w4_mid_rows");
}

void w4_experts(Tensor out, Tensor x, Tensor slots, Tensor tiles, Tensor codes, Tensor scales,
                std::optional<Tensor> zeros, std::optional<Tensor> up_codes, std::optional<Tensor> up_scales,
                std::optional<Tensor> up_zeros, int64_t most, int64_t rows_per_slot, int64_t blocks_per_group,
                int64_t zero) {
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Half, "x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && out.dim() == 2 && out.is_contiguous() &&
                      out.scalar_type() == x.scalar_type() && x.size(0) * rows_per_slot >= out.size(0),
                  "x and out [slots, N] must be dense and of one dtype");
  for (const Tensor* t : {&slots, &tiles})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous(), "slots and tiles must be dense int32");
  int64_t const tile_slots = tiles.numel() ? slots.numel() / tiles.numel() : 8;
  STD_TORCH_CHECK((tile_slots == 8 || tile_slots == 16) && slots.numel() == tile_slots * tiles.numel(),
                  "a tile has 8 or 16 slots");
  STD_TORCH_CHECK(most > 0 && most <= tile_slots, "a tile has 1 to ", tile_slots, " slots that are not padding");
  int64_t n = out.size(1), count = codes.size(0), blocks = codes.size(2);
  int64_t groups = blocks_per_group ? (blocks + blocks_per_group - 1) / blocks_per_group : 1;
  auto check_matrix = [&](const Tensor& c, const Tensor& s, const std::optional<Tensor>& z) {
    STD_TORCH_CHECK(c.scalar_type() == ScalarType::Char && c.is_contiguous() && c.dim() == 5 && c.size(0) == count &&
                        c.size(1) == (n + 63) / 64 && c.size(2) == blocks && c.size(3) == 64 && c.size(4) == 64,
                    "codes must be dense int8 [E, ceil(N / 64), blocks, 64, 64]");
    STD_TORCH_CHECK(s.is_contiguous() && s.numel() == count * groups * n && s.scalar_type() == scales.scalar_type(),
                    "scales must be dense [E, groups, N]");
    STD_TORCH_CHECK(!z || (z->scalar_type() == ScalarType::Char && z->is_contiguous() && z->numel() == s.numel()),
                    "zeros must be dense int8 [E, groups, N]");
  };
  check_matrix(codes, scales, zeros);
  if (up_codes) check_matrix(*up_codes, *up_scales, up_zeros);
  auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };
  check(nybble_w4_experts(out.mutable_data_ptr(), x.const_data_ptr(), static_cast<const int*>(slots.const_data_ptr()),
                          static_cast<const int*>(tiles.const_data_ptr()), codes.const_data_ptr(),
                          scales.const_data_ptr(), data(zeros), data(up_codes), data(up_scales), data(up_zeros),
                          static_cast<int>(tiles.numel()), static_cast<int>(tile_slots),
                          static_cast<int>(most), static_cast<int>(rows_per_slot), static_cast<int>(n), static_cast<int>(x.size(1)), static_cast<int>(blocks), static_cast<int>(blocks_per_group),
                          static_cast<int>(zero), codes.stride(0), groups * n, !is_bf16(x), scale_type(scales),
                          stream_of(out)),
        "w4_experts");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nybble, m) {
  m.def("w4_experts(Tensor(a!) out, Tensor x, Tensor slots, Tensor tiles, Tensor codes, Tensor scales, "
        "Tensor? zeros, Tensor? up_codes, Tensor? up_scales, Tensor? up_zeros, int most, int rows_per_slot, "
        "int blocks_per_group, int zero) -> ()");
  m.def("w4_few_rows(Tensor(a!) out, Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int blocks_per_group, int zero) -> ()");
  m.def("w4_mid_rows(Tensor(a!) out, Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int blocks_per_group, int zero, int splits) -> ()");
  m.def("fp8_few_rows(Tensor(a!) out, Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, Tensor? bias) -> ()");
  m.def("fp8_few_rows_rounding(Tensor(a!) out, Tensor x, Tensor w, Tensor? static_scale, Tensor w_scale, "
        "Tensor? bias) -> ()");
  m.def("silu_mul_fp8(Tensor(a!) codes, Tensor(b!) scales, Tensor x, Tensor? static_scale) -> ()");
  m.def(
      "paged_attention_v1(Tensor(a!) out, Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, float scale, "
      "int window, float k_scale, float v_scale) -> ()");
  m.def(
      "paged_attention_v2(Tensor(a!) out, Tensor(b!) partial, Tensor(c!) maxima, Tensor(d!) sums, Tensor q, "
      "Tensor cache, Tensor block_table, Tensor seq_lens, float scale, int window, float k_scale, float v_scale, "
      "int part_tokens) -> ()");
  m.def(
      "prompt_attention(Tensor(a!) out, Tensor(b!) counter, Tensor q, Tensor cache, Tensor query_start, "
      "Tensor seq_lens, Tensor block_table, float scale, float v_scale) -> ()");
  m.def(
      "reshape_and_cache(Tensor k, Tensor v, Tensor(a!) cache, Tensor slots, float k_scale, float v_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nybble, CUDA, m) {
  m.impl("w4_experts", TORCH_BOX(&w4_experts));
  m.impl("w4_few_rows", TORCH_BOX(&w4_few_rows));
  m.impl("w4_mid_rows", TORCH_BOX(&w4_mid_rows));
  m.impl("fp8_few_rows", TORCH_BOX(&fp8_few_rows));
  m.impl("fp8_few_rows_rounding", TORCH_BOX(&fp8_few_rows_rounding));
  m.impl("silu_mul_fp8", TORCH_BOX(&silu_mul_fp8));
  m.impl("paged_attention_v1", TORCH_BOX(&paged_attention_v1));
  m.impl("paged_attention_v2", TORCH_BOX(&paged_attention_v2));
  m.impl("prompt_attention", TORCH_BOX(&prompt_attention));
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
}
