// Writes K and V of new tokens into their slots of the paged cache, as they are or rounded to FP8.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int VALUES = 8;  // of 16 bits, that a thread moves at a time

__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// One block per token; y chooses K or V.
template <typename T, bool FP8>
__global__ void write(const T* k, const T* v, uint8_t* cache, const int64_t* slots, int64_t k_stride, int64_t v_stride,
                      int64_t plane_bytes, int width, float k_scale, float v_scale) {
  const int64_t slot = slots[blockIdx.x];
  if (slot < 0) return;  // a padded token
  const bool second = blockIdx.y == 1;
  const T* from = second ? v + blockIdx.x * v_stride : k + blockIdx.x * k_stride;
  const float scale = second ? v_scale : k_scale;
  uint8_t* to = cache + (second ? plane_bytes : 0) + slot * width * (FP8 ? 1 : 2);
  for (int i = threadIdx.x * VALUES; i < width; i += blockDim.x * VALUES) {
    const uint4 packed = *reinterpret_cast<const uint4*>(from + i);
    if constexpr (FP8) {
      T values[VALUES];
      memcpy(values, &packed, sizeof packed);
      uint32_t codes[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < VALUES; ++j)
        codes[j / 4] |= uint32_t(__nv_cvt_float_to_fp8(widen(values[j]) / scale, __NV_SATFINITE, __NV_E4M3)) << j % 4 * 8;
      *reinterpret_cast<uint2*>(to + i) = make_uint2(codes[0], codes[1]);
    } else {
      *reinterpret_cast<uint4*>(to + i * 2) = packed;
    }
  }
}

template <typename T, bool FP8>
int launch(const void* k, const void* v, void* cache, const int64_t* slots, int64_t tokens, int64_t k_stride,
           int64_t v_stride, int64_t plane_bytes, int width, float k_scale, float v_scale, cudaStream_t stream) {
  const int threads = min(256, (width / VALUES + 31) / 32 * 32);
  write<T, FP8><<<dim3(tokens, 2), threads, 0, stream>>>(static_cast<const T*>(k), static_cast<const T*>(v),
                                                         static_cast<uint8_t*>(cache), slots, k_stride, v_stride,
                                                         plane_bytes, width, k_scale, v_scale);
  return cudaGetLastError();
}

}  // namespace

// k, v: [tokens, width] with rows k_stride and v_stride elements apart; width = kv_heads * D, a multiple of 8.
extern "C" int nybble_reshape_and_cache(const void* k, const void* v, void* cache, const int64_t* slots, int64_t tokens,
                                        int64_t k_stride, int64_t v_stride, int64_t plane_bytes, int width,
                                        float k_scale, float v_scale, bool bf16, bool fp8, cudaStream_t stream) {
  if (tokens == 0) return 0;
  if (width % VALUES != 0) return -1;
  auto* run = bf16 ? (fp8 ? launch<__nv_bfloat16, true> : launch<__nv_bfloat16, false>)
                   : (fp8 ? launch<__half, true> : launch<__half, false>);
  return run(k, v, cache, slots, tokens, k_stride, v_stride, plane_bytes, width, k_scale, v_scale, stream);
}
