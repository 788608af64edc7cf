// Gated SiLU rounded to FP8 by token: the blocks of a cluster share a row, so that a wide row of one token does not wait
// for one multiprocessor. Of many tokens each has a block, or few: waiting for each other costs more than it brings.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "../rounding.cuh"

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kValues = 8, kMostBlocks = 8, kMostRuns = 4;
// So many blocks keep every multiprocessor busy. On an H200, 14336 wide, 8192 tokens take 239 us by two blocks a token, 304
// by eight, and 256 tokens 8.6 and 10.9.
constexpr int kEnough = 256;

struct Args {
  uint8_t* codes;
  float* scales;
  void const* x;
  float const* static_scale;
  int64_t x_row;
  int width;
};

// By the same instructions as Triton's kernel, whose results for other roundings are then this one's too.
__device__ inline float silu(float gate) {
  float value;
  asm("div.full.f32 %0, %1, %2;" : "=f"(value) : "f"(gate), "f"(1.0f + __expf(-gate)));
  return value;
}

// One token a cluster. Every step is rounded to T as the separate operations round, so that the codes are theirs.
template <typename T, int RUNS>
__global__ void __launch_bounds__(kThreads) silu_mul(Args p) {
#if __CUDA_ARCH__ >= 900
  using Pair = nybble::Pair<T>;
  __shared__ uint32_t peaks[kWarps], peak_here;
  auto cluster = cooperative_groups::this_cluster();
  int const blocks = cluster.num_blocks(), rank = cluster.block_rank();
  int64_t const token = blockIdx.x / blocks;
  nybble::wait_for_inputs();
  T const* gate = static_cast<T const*>(p.x) + token * p.x_row;
  uint4 y[RUNS];
  uint32_t peak = 0;
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    int const at = ((run * blocks + rank) * kThreads + threadIdx.x) * kValues;
    if (at >= p.width) continue;
    uint4 const held = *reinterpret_cast<uint4 const*>(gate + at);
    uint4 const up = *reinterpret_cast<uint4 const*>(gate + p.width + at);
    auto const* g2 = reinterpret_cast<typename Pair::Type const*>(&held);
    auto const* u2 = reinterpret_cast<typename Pair::Type const*>(&up);
    auto* y2 = reinterpret_cast<typename Pair::Type*>(&y[run]);
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      float2 const g = Pair::widen(g2[i]), u = Pair::widen(u2[i]);
      float2 const s = Pair::widen(Pair::narrow({silu(g.x), silu(g.y)}));
      y2[i] = Pair::narrow({s.x * u.x, s.y * u.y});
    }
    peak = max(peak, nybble::peak_of<T>(y[run]));
  }
  peak = nybble::peak_of_block<kWarps>(peak, peaks);
  if (threadIdx.x == 0) peak_here = peak;
  cluster.sync();
  for (int other = 0; other < blocks; ++other) peak = max(peak, *cluster.map_shared_rank(&peak_here, other));
  float const scale = nybble::scale_of(peak, p.static_scale);
  if (rank == 0 && threadIdx.x == 0) p.scales[token] = nybble::kept_scale(peak, scale);
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    int const at = ((run * blocks + rank) * kThreads + threadIdx.x) * kValues;
    if (at < p.width) *reinterpret_cast<uint2*>(p.codes + token * p.width + at) = nybble::codes_of<T>(y[run], scale);
  }
  cluster.sync();  // nobody's shared memory goes while another block reads it
#else
  __trap();  // older devices have no clusters; the library is built for them all the same, for its other kernels
#endif
}

template <typename T>
cudaError_t dispatch(Args const& args, int rows, int blocks, int runs, cudaStream_t stream) {
  auto kernel = runs == 1 ? silu_mul<T, 1> : runs == 2 ? silu_mul<T, 2> : silu_mul<T, kMostRuns>;
  return nybble::launch_early(kernel, args, dim3(rows * blocks), kThreads, stream, 0, blocks);
}

}  // namespace

// codes [rows, width] e4m3 and scales [rows] of silu(gate) * up, x holding gate and up [width] each in rows x_row values
// apart, float16 if `half`, else bfloat16. static_scale: null takes each token's largest value. For compute capability 9.0
// and later; width is a multiple of 8, 65536 at most.
extern "C" int nybble_silu_mul_fp8(void* codes, float* scales, void const* x, float const* static_scale, int64_t x_row,
                                   int rows, int width, int half, cudaStream_t stream) {
  int blocks = 1;
  auto runs_of = [width](int of) { return (width + of * kThreads * kValues - 1) / (of * kThreads * kValues); };
  while (blocks < kMostBlocks && (runs_of(blocks) > kMostRuns || (runs_of(blocks) > 1 && rows * blocks < kEnough)))
    blocks *= 2;
  int const runs = runs_of(blocks);
  auto at = [](void const* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (width <= 0 || width % kValues || x_row % kValues || runs > kMostRuns || !at(x, 16) || !at(codes, 8)) return -1;
  if (rows == 0) return 0;
  Args args{static_cast<uint8_t*>(codes), scales, x, static_scale, x_row, width};
  return half ? dispatch<__half>(args, rows, blocks, runs, stream)
              : dispatch<__nv_bfloat16>(args, rows, blocks, runs, stream);
}
