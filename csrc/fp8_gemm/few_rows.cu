// FP8 times FP8 for a few tokens: bound by reading the weights, so every warp reads its own part of them once, straight
// into the fragments of mma.m16n8k32, and no part waits for another's.
//
// A block owns 16 * ROW_TILES outputs; its warps take every kWarps-th run of 64 inputs and add up at the end. The four
// lanes of a quad hold a row's 64 codes as 16 bytes each, which are two steps of the product: the inputs' order inside a
// run is any, as long as weights and tokens agree on it. Sums are promoted to float32 registers every 128 inputs: the
// tensor cores keep fewer bits (DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"

namespace {

constexpr int kWarps = 8, kRun = 64, kUnroll = 2;

struct Args {
  void* out;
  uint8_t const* x;
  uint8_t const* w;
  float const* x_scale;
  float const* w_scale;
  void const* bias;
  int m, n, k;
  bool per_token, per_channel;
};

__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  __trap();  // older devices have no FP8; the library is built for them all the same, for its other kernels
#endif
}

template <typename T>
__device__ inline T narrow(float v);
template <>
__device__ inline __half narrow<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <typename T, int ROW_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(32 * kWarps) few_rows(Args p) {
  constexpr int kRows = 16 * ROW_TILES, kTokens = 8 * TOKEN_TILES;
  __shared__ float sums[kWarps][kRows][kTokens + 1];
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  int64_t const row0 = int64_t(blockIdx.x) * kRows;
  int const runs = (p.k + kRun - 1) / kRun;

  float total[ROW_TILES][TOKEN_TILES][4] = {};
  uint4 w[kUnroll][ROW_TILES][2];
  auto fetch = [&](int run) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int const at = (run + u * kWarps) * kRun + 16 * quad;
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; ++i) {
        int64_t const row = row0 + 8 * i + group;
        w[u][i / 2][i % 2] = at < p.k && row < p.n ? nybble::read_once(p.w + row * p.k + at) : uint4{0, 0, 0, 0};
      }
    }
  };

  fetch(warp);  // needs nothing of the kernel before, which may still run
  nybble::wait_for_inputs();
  for (int run = warp; run < runs; run += kUnroll * kWarps) {
    uint4 x[kUnroll][TOKEN_TILES];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int const at = (run + u * kWarps) * kRun + 16 * quad;
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        int const token = 8 * j + group;
        x[u][j] = at < p.k && token < p.m ? *reinterpret_cast<uint4 const*>(p.x + int64_t(token) * p.k + at)
                                          : uint4{0, 0, 0, 0};
      }
    }
    uint4 now[kUnroll][ROW_TILES][2];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) now[u][i][0] = w[u][i][0], now[u][i][1] = w[u][i][1];
    if (run + kUnroll * kWarps < runs) fetch(run + kUnroll * kWarps);
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        float part[4] = {};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          uint4 const a = now[u][i][0], b = now[u][i][1];
          mma(part, a.x, b.x, a.y, b.y, x[u][j].x, x[u][j].y);
          mma(part, a.z, b.z, a.w, b.w, x[u][j].z, x[u][j].w);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) total[i][j][c] += part[c];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[warp][16 * i + group + 8 * (c / 2)][8 * j + 2 * quad + c % 2] = total[i][j][c];
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kTokens; at += 32 * kWarps) {
    int const token = at / kRows, r = at % kRows;
    int64_t const row = row0 + r;
    if (token >= p.m || row >= p.n) continue;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += sums[i][r][token];
    sum *= p.x_scale[p.per_token ? token : 0] * p.w_scale[p.per_channel ? row : 0];
    if (p.bias != nullptr) sum += static_cast<float>(static_cast<T const*>(p.bias)[row]);
    static_cast<T*>(p.out)[int64_t(token) * p.n + row] = narrow<T>(sum);
  }
}

template <typename T>
cudaError_t dispatch(Args const& args, cudaStream_t stream) {
  dim3 const grid((args.n + 15) / 16);
  return nybble::launch_early(few_rows<T, 1, 1>, args, grid, 32 * kWarps, stream);
}

}  // namespace

// out [m, n] = (x [m, k] w [n, k]^T) * x_scale [m or 1] * w_scale [n or 1] + bias [n or null], for up to 8 tokens. x and
// w are e4m3 with dense rows of a multiple of 16, scales float32; out and bias float16 if `half`, else bfloat16.
extern "C" int nybble_fp8_few_rows(void* out, void const* x, void const* w, float const* x_scale, float const* w_scale,
                                   void const* bias, int m, int n, int k, int per_token, int per_channel, int half,
                                   cudaStream_t stream) {
  auto at16 = [](void const* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (k <= 0 || k % 16 || m > 8 || !at16(x) || !at16(w)) return -1;
  if (m == 0 || n == 0) return 0;
  Args args{out,     static_cast<uint8_t const*>(x), static_cast<uint8_t const*>(w), x_scale, w_scale, bias, m, n, k,
            per_token != 0, per_channel != 0};
  return half ? dispatch<__half>(args, stream) : dispatch<__nv_bfloat16>(args, stream);
}
