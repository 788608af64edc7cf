// The door of the FP8 product: checks what CUTLASS would not explain, and picks the tile.
#include "problem.cuh"

#include <cstdint>

namespace nybble::fp8 {
namespace {

// Few tokens: as narrow as holds them, the product is bound by reading the weights. Many: the large tile, once there
// is one for every multiprocessor.
int choose(Problem const& p) {
  if (p.m <= 16) return k64x16;
  if (p.m <= 64) return k64x64;
  int64_t large = int64_t((p.m + 127) / 128) * ((p.n + 127) / 128);
  return p.m <= 128 || large < p.sm_count ? k64x128 : k128x128;
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
