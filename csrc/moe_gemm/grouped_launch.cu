// The door of the experts' FP8 products: describes them on the device, and picks the tile by the average.
#include "grouped_problem.cuh"

#include <algorithm>
#include <type_traits>

namespace nybble::moe {
namespace {

constexpr size_t kAlign = 256;

size_t rounded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The arrays of `experts` entries at the start of `memory`, and how many bytes they take.
size_t place(Arrays& arrays, int experts, char* memory) {
  size_t used = 0;
  auto take = [&](auto*& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
    used += rounded(experts * sizeof(*pointer));
  };
  take(arrays.shapes), take(arrays.a), take(arrays.b), take(arrays.out), take(arrays.a_scale), take(arrays.b_scale);
  take(arrays.stride_in), take(arrays.stride_out);
  return used;
}

__global__ void describe(Arrays arrays, int experts, int n, int k, bool swapped, char* out, char const* a,
                         char const* b, float const* a_scale, float const* b_scale, int const* offsets) {
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int64_t first = offsets[e];
    int rows = offsets[e + 1] - offsets[e];
    arrays.shapes[e] = swapped ? GroupShape{n, rows, k} : GroupShape{rows, n, k};
    arrays.a[e] = a + first * k;
    arrays.b[e] = b + int64_t(e) * n * k;
    arrays.out[e] = out + first * n * 2;
    arrays.a_scale[e] = a_scale + first;
    arrays.b_scale[e] = b_scale + int64_t(e) * n;
    arrays.stride_in[e] = k;
    arrays.stride_out[e] = n;
  }
}

// Routing is uneven: an average near a tile's tokens means two tiles, and its weights read twice, for half the experts
// (us on an H100, 64 rows on average, Mixtral's gate and up: 489.6 by 128x128 against 573.4 by 64x64).
int choose(int rows, int experts) {
  int average = (rows + experts - 1) / experts;
  return average <= 16 ? k64x16 : average <= 32 ? k64x64 : k128x128;
}

}  // namespace
}  // namespace nybble::moe

// Bytes of workspace that `nybble_grouped_fp8_gemm` wants, whatever the routing.
extern "C" int64_t nybble_grouped_fp8_workspace(int experts, int sm_count) {
  using namespace nybble::moe;
  Arrays arrays;
  size_t most = std::max({workspace<k64x16>(experts, sm_count), workspace<k64x64>(experts, sm_count),
                          workspace<k128x128>(experts, sm_count)});
  return place(arrays, experts, nullptr) + rounded(most);
}

// out [rows, n] bf16: rows [offsets[e], offsets[e + 1]) are (a b[e]^T) * a_scale [rows] * b_scale [e, n], a [rows, k]
// and b [experts, n, k] e4m3, scales float32, offsets int32 [experts + 1] on the device, ascending; rows beyond the
// last are left alone. `config` -1 lets the average decide.
extern "C" int nybble_grouped_fp8_gemm(void* out, void const* a, void const* b, int const* offsets,
                                       float const* a_scale, float const* b_scale, void* workspace,
                                       int64_t workspace_bytes, int rows, int experts, int n, int k, int config,
                                       int sm_count, cudaStream_t stream) {
  using namespace nybble::moe;
  auto aligned = [](void const* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; };
  if (k <= 0 || n <= 0 || k % 16 || n % 8 || !aligned(a, 16) || !aligned(b, 16) || !aligned(out, 16)) return kAlignment;
  if (config >= kConfigs) return kConfig;
  int64_t needed = nybble_grouped_fp8_workspace(experts, sm_count);
  if (workspace_bytes < needed || !aligned(workspace, kAlign)) return kWorkspace;
  if (rows == 0 || experts == 0) return kOk;

  int chosen = config < 0 ? choose(rows, experts) : config;
  Arrays arrays;
  char* memory = static_cast<char*>(workspace);
  memory += place(arrays, experts, memory);
  describe<<<1, 128, 0, stream>>>(arrays, experts, n, k, chosen != k128x128, static_cast<char*>(out),
                                  static_cast<char const*>(a), static_cast<char const*>(b), a_scale, b_scale, offsets);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  switch (chosen) {
    case k64x16: return run<k64x16>(arrays, experts, sm_count, memory, stream);
    case k64x64: return run<k64x64>(arrays, experts, sm_count, memory, stream);
    default: return run<k128x128>(arrays, experts, sm_count, memory, stream);
  }
}
