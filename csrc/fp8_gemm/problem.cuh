// The FP8 product as it comes through the door; light, so that the launcher compiles without CUTLASS.
#pragma once

#include <cuda_runtime.h>

namespace nybble::fp8 {

// What a launcher returns besides a cudaError_t; supports() in Python refuses these first, with words.
enum Status : int { kOk = 0, kAlignment = -1, kConfig = -2, kWorkspace = -3, kUnsupported = -4 };

struct Problem {
  void* out;
  void const* a;
  void const* b;
  float const* a_scale;
  float const* b_scale;
  void const* bias;
  int m, n, k;
  bool a_per_row, b_per_channel;
  int sm_count;
  cudaStream_t stream;
};

// Tiles, in order of the tokens that they are for.
enum Config : int { k64x16, k64x64, k64x128, k128x128, kConfigs };

// Compiled in several units: CUTLASS takes a core and gigabytes for half a minute a tile.
template <bool half, int config>
int run(Problem const& problem);

}  // namespace nybble::fp8
