// What every binding shares: torch's current stream without its CUDA headers, and errors that name their op.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

// The CUDA runtime's stream; its headers are not needed here.
typedef struct CUstream_st* cudaStream_t;

// Linked in with the static CUDA runtime.
extern "C" const char* cudaGetErrorString(int error);

// Weak: a torch without CUDA has no such symbol, and the library must load there (schemas are tested on CPU).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace nybble {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  STD_TORCH_CHECK(code >= 0, "nybble::", op, " was not built for these shapes or dtypes (launcher code ", code, ")");
  STD_TORCH_CHECK(code == 0, "nybble::", op, ": ", cudaGetErrorString(code));
}

}  // namespace nybble
