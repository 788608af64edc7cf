// Vectors of float32 as wide as the processor's registers, in GCC's vector extensions, and 16-bit values as such.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu_type.h"

namespace nybble {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// f of a value of the type named; -2, a kernel's error code, for a type that has none.
template <typename F>
inline int by_type(CpuType type, const F& f) {
  switch (type) {
    case CPU_FLOAT32: f(float{}); return 0;
    case CPU_BFLOAT16: f(BFloat16{}); return 0;
    case CPU_FLOAT16: f(Float16{}); return 0;
  }
  return -2;
}

constexpr int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats select(Ints chosen, Floats a, Floats b) { return chosen ? a : b; }

inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  return lanes;
}

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const BFloat16* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline Floats load(const Float16* from) {
#if defined(__F16C__) && defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  Words wide = __builtin_convertvector(bits, Words), sign = (wide & 0x8000u) << 16, rest = wide & 0x7fffu;
  // The exponent's bias is mended by a product, which makes subnormals right as well.
  Floats value = (Floats)(rest << 13) * 0x1p112f;
  Words huge = (Words)(rest >= 0x7c00u) & 0x7f800000u;
  return (Floats)((Words)value | huge | sign);
#endif
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// To the nearest, of two the even one.
inline void store(BFloat16* to, Floats x) {
  Words bits = (Words)x;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Words quiet = (bits >> 16) | 0x40u;
  Shorts out = __builtin_convertvector(x == x ? rounded : quiet, Shorts);
  std::memcpy(to, &out, sizeof out);
}

inline void store(Float16* to, Floats x) {
#if defined(__F16C__) && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  Words sign = ((Words)x >> 16) & 0x8000u;
  Floats size = (Floats)((Words)x & 0x7fffffffu);
  // Adding a power of two that leaves the right bits behind rounds a subnormal.
  Words small = (Words)(size + 0.5f) - 0x3f000000u, bits = (Words)size;
  Words normal = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  Words finite = size < 0x1p-14f ? small : normal;
  Words special = size == size ? Words{} + 0x7c00u : Words{} + 0x7e00u;
  Words out = (size < 65520.0f ? finite : special) | sign;
  Shorts cut = __builtin_convertvector(out, Shorts);
  std::memcpy(to, &cut, sizeof cut);
#endif
}

// The first `count` of a row's values, zeros behind them.
template <typename T>
inline Floats load(const T* from, int count) {
  if (count >= LANES) return load(from);
  T some[LANES] = {};
  std::memcpy(some, from, count * sizeof(T));
  return load(some);
}

template <typename T>
inline void store(T* to, Floats x, int count) {
  if (count >= LANES) return store(to, x);
  T some[LANES];
  store(some, x);
  std::memcpy(to, some, count * sizeof(T));
}

// x as it would be read back.
template <typename T>
inline Floats rounded(Floats x) {
  T kept[LANES];
  store(kept, x);
  return load(kept);
}

// In a fixed order, so that a result is always the same.
inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

// The larger, and NaN where either is.
inline Floats larger(Floats x, Floats y) { return select((x > y) | (x != x), x, y); }

inline float largest(Floats x) {
  float found = x[0];
  for (int i = 1; i < LANES; i++) found = x[i] > found || x[i] != x[i] ? x[i] : found;
  return found;
}

// 2^x for x <= 0 within 2e-7 of itself, 0 below 2^-126; a polynomial (least squares, reweighted to the smallest largest
// relative error) on [-0.5, 0.5], and the whole part as an exponent.
inline Floats exp2_of(Floats x) {
  const float whole_bits = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the whole number nearest to x
  Floats inside = select(x < -126.0f, broadcast(-126.0f), x);
  Floats shifted = inside + whole_bits, rest = inside - (shifted - whole_bits);
  Floats y = broadcast(0.00015345810970757157f);
  y = y * rest + 0.0013399930903688073f;
  y = y * rest + 0.009618489071726799f;
  y = y * rest + 0.05550328642129898f;
  y = y * rest + 0.24022646248340607f;
  y = y * rest + 0.6931471824645996f;
  y = y * rest + 1.0f;
  y = y * (Floats)(((Ints)shifted + 127) << 23);
  return select(x < -126.0f, Floats{}, y);
}

#if defined(__clang__)
#define NYBBLE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define NYBBLE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// x[i][j] and x[j][i] change places: interleaving the first with the second half of the rows, log2(LANES) times.
inline void transpose(Floats (&x)[LANES]) {
  Floats y[LANES];
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      Floats a = x[i], b = x[i + LANES / 2];
#if defined(__AVX512F__)
      y[2 * i] = NYBBLE_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      y[2 * i + 1] = NYBBLE_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
      y[2 * i] = NYBBLE_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      y[2 * i + 1] = NYBBLE_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      y[2 * i] = NYBBLE_SHUFFLE(a, b, 0, 4, 1, 5);
      y[2 * i + 1] = NYBBLE_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
}

}  // namespace nybble
