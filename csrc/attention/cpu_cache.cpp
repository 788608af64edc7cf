// Storing new tokens in the paged cache on the CPU: plain, or rotating (and norming) queries and keys on the way.
#include <algorithm>

#include "attention/cpu_attention.h"
#include "cpu_vector.h"

namespace {

using namespace nybble;

constexpr int64_t GRAIN_VALUES = 16384;  // below this a second thread costs more than it takes over

int64_t grain_of(int64_t values_per_token) { return std::max<int64_t>(1, GRAIN_VALUES / values_per_token); }

template <typename T>
T* place(const CpuStore& a, int64_t slot) {
  return static_cast<T*>(a.cache) + slot * a.kv_heads * a.dim;
}

template <typename T>
void store_kv(const CpuStore& a) {
  const int64_t width = int64_t(a.kv_heads) * a.dim;
  in_parallel(a.parallel, a.tokens, grain_of(2 * width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (a.slots[t] < 0) continue;
      T* to = place<T>(a, a.slots[t]);
      std::memcpy(to, static_cast<const T*>(a.k) + t * a.k_stride, width * sizeof(T));
      std::memcpy(to + a.plane_size, static_cast<const T*>(a.v) + t * a.v_stride, width * sizeof(T));
    }
  });
}

// 1 / sqrt(mean square + eps) of a head (arXiv 1910.07467); 1 without a norm.
template <typename T>
Floats norm_of(const T* x, int dim, float eps, const T* weight) {
  if (weight == nullptr) return broadcast(1.0f);
  Floats squares{};
  for (int d = 0; d < dim; d += LANES) {
    Floats y = load(x + d, dim - d);
    squares += y * y;
  }
  return broadcast(1.0f / std::sqrt(sum(squares) / dim + eps));
}

// The halves of a head turned against each other (arXiv 2104.09864): sin is negated in its first half.
template <typename T>
void rotate(T* to, const T* x, const T* cos, const T* sin, int dim, Floats norm, const T* weight) {
  const int half = dim / 2;
  for (int d = 0; d < half; d += LANES) {
    const int count = half - d;
    Floats a = load(x + d, count), b = load(x + half + d, count);
    if (weight != nullptr) {
      a *= norm * load(weight + d, count);
      b *= norm * load(weight + half + d, count);
    }
    store(to + d, a * load(cos + d, count) + b * load(sin + d, count), count);
    store(to + half + d, b * load(cos + half + d, count) + a * load(sin + half + d, count), count);
  }
}

template <typename T>
void rope_and_cache(const CpuStore& a) {
  const T *q_weight = static_cast<const T*>(a.q_weight), *k_weight = static_cast<const T*>(a.k_weight);
  in_parallel(a.parallel, a.tokens, grain_of(int64_t(a.heads + 2 * a.kv_heads) * a.dim), [&](int64_t begin,
                                                                                           int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const T* q = static_cast<const T*>(a.q) + t * a.q_stride;
      const T* k = q + int64_t(a.heads) * a.dim;
      const T *cos = static_cast<const T*>(a.cos) + t * a.cos_stride,
              *sin = static_cast<const T*>(a.sin) + t * a.cos_stride;
      T* to = static_cast<T*>(a.q_out) + t * a.heads * a.dim;
      for (int h = 0; h < a.heads; h++, q += a.dim, to += a.dim)
        rotate(to, q, cos, sin, a.dim, norm_of(q, a.dim, a.eps, q_weight), q_weight);
      if (a.slots[t] < 0) continue;
      to = place<T>(a, a.slots[t]);
      std::memcpy(to + a.plane_size, k + int64_t(a.kv_heads) * a.dim, sizeof(T) * a.kv_heads * a.dim);
      for (int h = 0; h < a.kv_heads; h++, k += a.dim, to += a.dim)
        rotate(to, k, cos, sin, a.dim, norm_of(k, a.dim, a.eps, k_weight), k_weight);
    }
  });
}

}  // namespace

extern "C" int nybble_cpu_store_kv(const CpuStore* a) {
  return by_type(a->type, [&](auto value) { store_kv<decltype(value)>(*a); });
}

extern "C" int nybble_cpu_rope_and_cache(const CpuStore* a) {
  return by_type(a->type, [&](auto value) { rope_and_cache<decltype(value)>(*a); });
}
