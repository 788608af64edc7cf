// What every CUDA binding shares: torch's current stream without its CUDA headers, and errors that name their op.
#pragma once

#include "bind_common.h"

// The CUDA runtime's stream; its headers are not needed here.
typedef struct CUstream_st* cudaStream_t;

// Linked in with the static CUDA runtime.
extern "C" const char* cudaGetErrorString(int error);

// Weak: a torch without CUDA has no such symbol, and the library must load there (schemas are tested on CPU).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace nybble {

// The stream that torch works on, on the tensor's device. The caller has made that device current.
inline cudaStream_t stream_of(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "nybble: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "nybble: torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// A launcher returns 0, a cudaError_t, or a negative code for a shape that it was not built for.
inline void check(int code, const char* op) {
  check_built(code, op);
  STD_TORCH_CHECK(code == 0, "nybble::", op, ": ", cudaGetErrorString(code));
}

// `count` scales.
inline const float* floats(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count, name, " must hold ",
                  count, " float32 values");
  return static_cast<const float*>(t.const_data_ptr());
}

inline void check_codes(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float8_e4m3fn && t.is_contiguous() && t.dim() == dim, name,
                  " must be dense float8_e4m3fn of ", dim, " dimensions");
}

// out [M, N] = a [M, K] b [N, K]^T + bias [N] of out's dtype, a and b being FP8 codes.
inline void check_product(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  check_codes(a, 2, "a"), check_codes(b, 2, "b");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Half || out.scalar_type() == ScalarType::BFloat16,
                  "out must be float16 or bfloat16");
  STD_TORCH_CHECK(b.size(1) == a.size(1) && out.dim() == 2 && out.size(0) == a.size(0) && out.size(1) == b.size(0) &&
                      out.is_contiguous(),
                  "out [M, N] = a [M, K] b [N, K]^T do not fit each other");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == out.scalar_type() && bias->numel() == b.size(0) &&
                            bias->is_contiguous()),
                  "bias must be [N] of out's dtype");
}

}  // namespace nybble
