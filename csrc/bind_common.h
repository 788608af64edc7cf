// What every binding includes of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace nybble {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a launcher gives for shapes or dtypes that it was not built for is below 0.
inline void check_built(int code, const char* op) {
  STD_TORCH_CHECK(code >= 0, "nybble::", op, " was not built for these shapes or dtypes (launcher code ", code, ")");
}

}  // namespace nybble
