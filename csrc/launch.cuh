// What launches of several families share.
#pragma once

#include <cuda_runtime.h>

namespace nybble {

// Lets a kernel start while the one before it still runs (programmatic dependent launch), where there is such a thing:
// the kernel then waits with griddepcontrol.wait. Returns how many attributes were set.
inline unsigned start_early(cudaLaunchAttribute* attribute) {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 9)
    return 0;
  attribute->id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute->val.programmaticStreamSerializationAllowed = 1;
  return 1;
}

}  // namespace nybble
