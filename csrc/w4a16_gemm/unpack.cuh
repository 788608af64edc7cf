// 4-bit codes to 16-bit values less their zero points, two at a time and exact: a code under the exponent of 128 (bfloat16;
// 1024 in float16) is that number plus the code, from which it and the zero point are subtracted.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nybble {

// The scales of a block of inputs are those of group block * inverse >> kInverseBits.
constexpr int kInverseBits = 20;

template <typename T>
struct Type;
template <>
struct Type<__half> {
  static constexpr uint32_t kMagic = 0x64006400;
  using Pair = __half2;
  static __device__ __half narrow(float v) { return __float2half_rn(v); }
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr uint32_t kMagic = 0x43004300;
  using Pair = __nv_bfloat162;
  static __device__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Two codes of a word, at bits `shift` and `shift` + 16, less the zero point that `offset` holds twice under the magic.
template <typename T>
__device__ inline uint32_t unpack(uint32_t word, int shift, uint32_t offset) {
  using Pair = typename Type<T>::Pair;
  uint32_t raised;  // (word >> shift & 0x000F000F) | magic, which the compiler makes two instructions of
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(raised) : "r"(word >> shift), "r"(0x000F000Fu), "r"(Type<T>::kMagic));
  Pair const exact = __hsub2(*reinterpret_cast<Pair const*>(&raised), *reinterpret_cast<Pair const*>(&offset));
  return *reinterpret_cast<uint32_t const*>(&exact);
}

}  // namespace nybble
