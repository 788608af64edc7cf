// Rounding 16-bit values to FP8 codes with one scale, exactly as csrc/quantize/reference.py does, in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

namespace nybble {

constexpr float kLargestFp8 = 448.0f;  // of e4m3
constexpr uint32_t kInfinity = 0x7F800000;

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ float2 widen(__half2 v) { return __half22float2(v); }
  static __device__ __half2 narrow(float2 v) { return __float22half2_rn(v); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ float2 widen(__nv_bfloat162 v) { return __bfloat1622float2(v); }
  static __device__ __nv_bfloat162 narrow(float2 v) { return __float22bfloat162_rn(v); }
};

// The largest size among the eight values of a vector, as its bits in float32. Sizes are compared as the integers that
// their bits are: NaN is then above infinity, and that above all else.
template <typename T>
__device__ inline uint32_t peak_of(uint4 const& held) {
  constexpr uint32_t kSizes = 0x7FFF7FFF;
  uint32_t const two = __vmaxu2(__vmaxu2(held.x & kSizes, held.y & kSizes), __vmaxu2(held.z & kSizes, held.w & kSizes));
  float2 const v = Pair<T>::widen(reinterpret_cast<typename Pair<T>::Type const&>(two));
  return max(__float_as_uint(v.x), __float_as_uint(v.y));
}

// The largest of all threads of a block of WARPS warps; every thread gets it. `shared` may be used again after the next
// barrier.
template <int WARPS>
__device__ inline uint32_t peak_of_block(uint32_t peak, uint32_t (&shared)[WARPS]) {
#if __CUDA_ARCH__ >= 800
  peak = __reduce_max_sync(0xFFFFFFFFu, peak);
#endif
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = peak;
  __syncthreads();
  peak = shared[0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) peak = max(peak, shared[i]);
  return peak;
}

// What the codes are divided by; `given` is a static scale, or null.
__device__ inline float scale_of(uint32_t peak, float const* given) {
  return given != nullptr ? *given : fmaxf(__fdiv_rn(__uint_as_float(peak), kLargestFp8), FLT_EPSILON);
}

// What the codes are multiplied by: a NaN or an infinity never becomes a number.
__device__ inline float kept_scale(uint32_t peak, float scale) { return peak < kInfinity ? scale : NAN; }

template <typename T>
__device__ inline uint2 codes_of(uint4 const& held, float scale) {
  auto const* pairs = reinterpret_cast<typename Pair<T>::Type const*>(&held);
  uint32_t two[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 v = Pair<T>::widen(pairs[i]);
    v.x = fminf(fmaxf(__fdiv_rn(v.x, scale), -kLargestFp8), kLargestFp8);
    v.y = fminf(fmaxf(__fdiv_rn(v.y, scale), -kLargestFp8), kLargestFp8);
    two[i] = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
  }
  return uint2{two[0] | two[1] << 16, two[2] | two[3] << 16};
}

}  // namespace nybble
