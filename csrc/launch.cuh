// What kernels share that start while the one before them still runs (programmatic dependent launch), and read on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nybble {

// 16 bytes of weights, which are read once: they need no place in the first cache.
__device__ inline uint4 read_once(uint8_t const* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Before it only weights may be read, which no kernel in flight writes: the one that makes the inputs may still run. The kernel behind this one may be
// launched from here on; it waits in its turn.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel that calls wait_for_inputs; on devices without early starts as any other. `cluster` blocks next to
// each other share their memory; more than one are for compute capability 9.0 and later.
template <typename Args>
cudaError_t launch_early(void (*kernel)(Args), Args const& args, dim3 grid, int threads, cudaStream_t stream,
                         int shared_bytes = 0, int cluster = 1) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  if (cluster > 1 && major < 9) return cudaErrorNotSupported;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace nybble
