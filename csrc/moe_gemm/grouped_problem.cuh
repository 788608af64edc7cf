// What describes the products of a layer of experts to CUTLASS; light, so that the launcher compiles without it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace nybble::moe {

// What a launcher returns besides a cudaError_t; supports() in Python refuses these first, with words.
enum Status : int { kOk = 0, kAlignment = -1, kConfig = -2, kWorkspace = -3, kUnsupported = -4 };

// Tiles, in order of the tokens of an expert that they are for.
enum Config : int { k64x16, k64x64, k128x128, kConfigs };

struct GroupShape {
  int m, n, k;
};

// One entry an expert, in device memory, written by a kernel: the host never learns the routing.
struct Arrays {
  GroupShape* shapes = nullptr;
  void const** a = nullptr;
  void const** b = nullptr;
  void** out = nullptr;
  float const** a_scale = nullptr;
  float const** b_scale = nullptr;
  int64_t* stride_in = nullptr;
  int64_t* stride_out = nullptr;
};

// Compiled in several units: CUTLASS takes a core and gigabytes for half a minute a tile.
template <int config>
int run(Arrays const& arrays, int experts, int sm_count, void* workspace, cudaStream_t stream);
template <int config>
size_t workspace(int experts, int sm_count);

}  // namespace nybble::moe
