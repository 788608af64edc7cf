// The value types of the CPU kernels, as a binding names them to a source.
#pragma once

namespace nybble {

enum CpuType { CPU_FLOAT32, CPU_BFLOAT16, CPU_FLOAT16 };

}  // namespace nybble
