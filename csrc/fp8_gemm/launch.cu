// The door of the FP8 product: checks what CUTLASS would not explain, and picks the tile.
#include "problem.cuh"

#include <cstdint>

namespace nybble::fp8 {
namespace {

// Few tokens: as narrow as holds them, the product is bound by reading the weights. Up to 128: two narrow tiles each,
// if all run at once (us on an H100, 128 tokens, K 4096: N 4096 11.1 against 14.8; N 6144 17.8 against 15.4). More: the
// large tile, even where it leaves multiprocessors idle (512 tokens, N and K 4096: 17.1 against 24.6).
int choose(Problem const& p) {
  if (p.m <= 16) return k64x16;
  if (p.m > 128) return k128x128;
  int64_t narrow = int64_t((p.m + 63) / 64) * ((p.n + 63) / 64);
  return p.m <= 64 || narrow <= p.sm_count ? k64x64 : k64x128;
}

template <bool half>
int dispatch(Problem const& p, int config) {
  switch (config < 0 ? choose(p) : config) {
    case k64x16: return run<half, k64x16>(p);
    case k64x64: return run<half, k64x64>(p);
    case k64x128: return run<half, k64x128>(p);
    case k128x128: return run<half, k128x128>(p);
    default: return kConfig;
  }
}

}  // namespace
}  // namespace nybble::fp8

// out [m, n] = (a [m, k] b [n, k]^T) * a_scale [m or 1] * b_scale [n or 1] + bias [n or null]. a and b are e4m3, scales
// float32; out and bias float16 if `half`, else bfloat16. All rows are dense. `config` -1 lets the shape decide.
extern "C" int nybble_fp8_gemm(void* out, void const* a, void const* b, float const* a_scale, float const* b_scale,
                               void const* bias, int m, int n, int k, int a_per_row, int b_per_channel, int half,
                               int config, int sm_count, cudaStream_t stream) {
  using namespace nybble::fp8;
  auto at16 = [](void const* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (k <= 0 || n <= 0 || k % 16 || n % 8 || !at16(a) || !at16(b) || !at16(out)) return kAlignment;
  if (m == 0) return kOk;
  Problem problem{out, a, b, a_scale, b_scale, bias, m, n, k, a_per_row != 0, b_per_channel != 0, sm_count, stream};
  return half ? dispatch<true>(problem, config) : dispatch<false>(problem, config);
}
