// RMSNorm after a residual's sum, and gated SiLU, on the CPU: each in one pass, arithmetic in float32.
#include "norm_rope/cpu_norm.h"

#include <algorithm>

#include "cpu_vector.h"

namespace {

using namespace nybble;

constexpr int64_t GRAIN_VALUES = 16384;  // below this a second thread costs more than it takes over

template <typename T>
void rms_norm(const CpuNorm& a) {
  const int width = static_cast<int>(a.width);
  const T* weight = static_cast<const T*>(a.weight);
  in_parallel(a.parallel, a.rows, std::max<int64_t>(1, GRAIN_VALUES / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      T* out = static_cast<T*>(a.out) + row * width;
      Floats squares{};
      if (a.residual != nullptr) {
        const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
        T* total = static_cast<T*>(a.total) + row * width;
        for (int d = 0; d < width; d += LANES)  // the sum is rounded as it is kept, and normed as it is rounded
          store(total + d, load(x + d, width - d) + load(residual + d, width - d), width - d);
        x = total;
      }
      for (int d = 0; d < width; d += LANES) {
        Floats y = load(x + d, width - d);
        squares += y * y;
      }
      const Floats norm = broadcast(1.0f / std::sqrt(sum(squares) / width + a.eps));
      for (int d = 0; d < width; d += LANES)
        store(out + d, rounded<T>(load(x + d, width - d) * norm) * load(weight + d, width - d), width - d);
    }
  });
}

// gate / (1 + e^-gate), by powers of two that cannot overflow.
inline Floats silu(Floats gate) {
  const float log2e = 1.4426950408889634f;
  Floats size = select(gate < 0.0f, gate, -gate), power = exp2_of(size * log2e);  // e^-|gate|
  return gate * select(gate < 0.0f, power, broadcast(1.0f)) / (power + 1.0f);
}

template <typename T>
void silu_mul(const CpuGate& a) {
  const int width = static_cast<int>(a.width);
  in_parallel(a.parallel, a.rows, std::max<int64_t>(1, GRAIN_VALUES / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* gate = static_cast<const T*>(a.x) + row * a.x_stride;
      T* out = static_cast<T*>(a.out) + row * width;
      for (int d = 0; d < width; d += LANES)
        store(out + d, silu(load(gate + d, width - d)) * load(gate + width + d, width - d), width - d);
    }
  });
}

}  // namespace

extern "C" int nybble_cpu_rms_norm(const CpuNorm* a) {
  return by_type(a->type, [&](auto value) { rms_norm<decltype(value)>(*a); });
}

extern "C" int nybble_cpu_silu_mul(const CpuGate* a) {
  return by_type(a->type, [&](auto value) { silu_mul<decltype(value)>(*a); });
}
