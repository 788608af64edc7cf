// Arguments of the CPU's norm and gate, shared by their source and the binding.
#pragma once

#include <cstdint>

#include "cpu_threads.h"
#include "cpu_type.h"

namespace nybble {

// x [rows, width] with rows x_stride apart, out dense, all of `type`.
struct CpuNorm {
  void* out;
  void* total;           // x + residual; null without one
  const void* x;
  const void* residual;  // null: none
  const void* weight;
  int64_t rows, width, x_stride, residual_stride;
  float eps;
  CpuType type;
  Parallel parallel;
};

// x [rows, 2 width]: gates, then what they let through; out [rows, width] dense.
struct CpuGate {
  void* out;
  const void* x;
  int64_t rows, width, x_stride;
  CpuType type;
  Parallel parallel;
};

}  // namespace nybble
