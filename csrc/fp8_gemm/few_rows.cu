// FP8 times FP8 for a few tokens: bound by reading the weights, so every warp reads its own part of them once, straight
// into the fragments of mma.m16n8k32, and no part waits for another's.
//
// A block owns 16 outputs; its warps take every kWarps-th run of 64 inputs and add up at the end. The four lanes of a
// quad hold a row's 64 codes as 16 bytes each, which are two steps of the product: the inputs' order inside a run is any,
// as long as weights and tokens agree on it. kAhead runs of a warp are always on their way: what is used is asked for
// anew at once. Sums are promoted to float32 registers every 128 inputs: the tensor cores keep fewer bits (DeepSeek-V3
// report, arXiv 2412.19437, section 3.3.2).
//
// Inputs come as codes, or in 16 bits: then every block rounds all of them for itself, in shared memory, which for few
// and narrow tokens takes less time than a launch that does nothing else.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "../rounding.cuh"

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kRun = 64, kStep = kWarps * kRun, kAhead = 4;
constexpr int kRows = 16, kTokens = 8;
// Bytes of rounded inputs in shared memory: no more than a launch may have without asking, beside the sums.
constexpr int kRoundedBytes = 40960;

struct Args {
  void* out;
  void const* x;  // codes, or 16-bit values
  uint8_t const* w;
  float const* x_scale;  // of the codes; of values the static scale, or null
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

// Bytes between the rounded tokens in shared memory: neighbours lie in different halves of the banks.
__host__ __device__ constexpr int rounded_stride(int k) { return (k + 127) / 128 * 128 + 64; }

// Rounds all tokens to codes [m, stride] and scales [m].
template <typename T>
__device__ inline void round_inputs(Args const& p, uint8_t* codes, float* scales) {
  __shared__ uint32_t peaks[kWarps];
  int const stride = rounded_stride(p.k);
  for (int token = 0; token < p.m; ++token) {
    T const* x = static_cast<T const*>(p.x) + int64_t(token) * p.k;
    uint32_t peak = 0;
    for (int at = 8 * threadIdx.x; at < p.k; at += 8 * kThreads)
      peak = max(peak, nybble::peak_of<T>(*reinterpret_cast<uint4 const*>(x + at)));
    peak = nybble::peak_of_block<kWarps>(peak, peaks);
    float const scale = nybble::scale_of(peak, p.x_scale);
    if (threadIdx.x == 0) scales[token] = nybble::kept_scale(peak, scale);
    for (int at = 8 * threadIdx.x; at < p.k; at += 8 * kThreads)
      *reinterpret_cast<uint2*>(codes + token * stride + at) =
          nybble::codes_of<T>(*reinterpret_cast<uint4 const*>(x + at), scale);
    __syncthreads();
  }
}

template <typename T, bool ROUND>
__global__ void __launch_bounds__(kThreads, 3) few_rows(Args p) {
  extern __shared__ uint4 rounded[];
  __shared__ float sums[kWarps][kRows][kTokens + 1];
  __shared__ float scales[kTokens];
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  int const row0 = blockIdx.x * kRows, first = warp * kRun + 16 * quad;
  // Rows beyond the last are read as the last one, and not stored.
  uint8_t const* const w_at[2] = {p.w + int64_t(min(row0 + group, p.n - 1)) * p.k + first,
                                  p.w + int64_t(min(row0 + group + 8, p.n - 1)) * p.k + first};
  uint4 w[kAhead][2] = {}, x[kAhead];
  auto fetch = [&](int u, int step) {
    if (first + step < p.k) w[u][0] = nybble::read_once(w_at[0] + step), w[u][1] = nybble::read_once(w_at[1] + step);
  };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) fetch(u, u * kStep);  // needs nothing of the kernel before, which may still run
  nybble::wait_for_inputs();
  uint8_t const* x_at = static_cast<uint8_t const*>(p.x) + int64_t(group) * p.k + first;
  if constexpr (ROUND) {
    uint8_t* const codes = reinterpret_cast<uint8_t*>(rounded);
    round_inputs<T>(p, codes, scales);
    x_at = codes + group * rounded_stride(p.k) + first;
  }
  // Beyond the last input there are zeros, whatever is still held of the weights.
  auto fetch_inputs = [&](int u, int step) {
    x[u] = first + step < p.k && group < p.m ? *reinterpret_cast<uint4 const*>(x_at + step) : uint4{0, 0, 0, 0};
  };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) fetch_inputs(u, u * kStep);
  float total[4] = {};
  for (int step = 0; step < p.k; step += kAhead * kStep) {
#pragma unroll
    for (int pair = 0; pair < kAhead; pair += 2) {
      float part[4] = {};
#pragma unroll
      for (int u = pair; u < pair + 2; ++u) {
        mma(part, w[u][0].x, w[u][1].x, w[u][0].y, w[u][1].y, x[u].x, x[u].y);
        mma(part, w[u][0].z, w[u][1].z, w[u][0].w, w[u][1].w, x[u].z, x[u].w);
        int const next = step + (u + kAhead) * kStep;
        fetch(u, next), fetch_inputs(u, next);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] += part[c];
    }
  }

#pragma unroll
  for (int c = 0; c < 4; ++c) sums[warp][group + 8 * (c / 2)][2 * quad + c % 2] = total[c];
  __syncthreads();
  if (threadIdx.x < kRows * kTokens) {
    int const token = threadIdx.x / kRows, r = threadIdx.x % kRows;
    int const row = row0 + r;
    if (token >= p.m || row >= p.n) return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += sums[i][r][token];
    sum *= (ROUND ? scales[token] : p.x_scale[p.per_token ? token : 0]) * p.w_scale[p.per_channel ? row : 0];
    if (p.bias != nullptr) sum += static_cast<float>(static_cast<T const*>(p.bias)[row]);
    static_cast<T*>(p.out)[int64_t(token) * p.n + row] = narrow<T>(sum);
  }
}

template <typename T>
cudaError_t dispatch(Args const& args, bool round, cudaStream_t stream) {
  dim3 const grid((args.n + kRows - 1) / kRows);
  if (round)
    return nybble::launch_early(few_rows<T, true>, args, grid, kThreads, stream, args.m * rounded_stride(args.k));
  return nybble::launch_early(few_rows<T, false>, args, grid, kThreads, stream);
}

int product(Args const& args, bool round, int half, cudaStream_t stream) {
  auto at16 = [](void const* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (args.k <= 0 || args.k % 16 || args.m > kTokens || !at16(args.x) || !at16(args.w)) return -1;
  if (round && args.m * rounded_stride(args.k) > kRoundedBytes) return -2;
  if (args.m == 0 || args.n == 0) return 0;
  return half ? dispatch<__half>(args, round, stream) : dispatch<__nv_bfloat16>(args, round, stream);
}

}  // namespace

// out [m, n] = (x [m, k] w [n, k]^T) * x_scale [m or 1] * w_scale [n or 1] + bias [n or null], for up to 8 tokens. x and
// w are e4m3 with dense rows of a multiple of 16, scales float32; out and bias float16 if `half`, else bfloat16.
extern "C" int nybble_fp8_few_rows(void* out, void const* x, void const* w, float const* x_scale, float const* w_scale,
                                   void const* bias, int m, int n, int k, int per_token, int per_channel, int half,
                                   cudaStream_t stream) {
  Args args{out,     x, static_cast<uint8_t const*>(w), x_scale, w_scale, bias, m, n, k, per_token != 0,
            per_channel != 0};
  return product(args, false, half, stream);
}

// The same of x in out's dtype, each token rounded by its largest value, or all by *static_scale where that is not null;
// m (k + 191) may be 40960 at most.
extern "C" int nybble_fp8_few_rows_rounding(void* out, void const* x, void const* w, float const* static_scale,
                                            float const* w_scale, void const* bias, int m, int n, int k,
                                            int per_channel, int half, cudaStream_t stream) {
  Args args{out, x, static_cast<uint8_t const*>(w), static_scale, w_scale, bias, m, n, k, true, per_channel != 0};
  return product(args, true, half, stream);
}
