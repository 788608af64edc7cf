// A product of small float32 matrices, its sums in registers and each in one order whatever the number of rows.
#pragma once

#include "cpu_vector.h"

namespace nybble {

// Rows and vectors of the sums that are held in registers at once.
constexpr int PRODUCT_ROWS = 4, PRODUCT_VECTORS = LANES == 16 ? 4 : 2;

// sums[R][N vectors] (+)= a[R][depth] b[depth][N vectors]
template <int R, int N>
inline void product_block(float* sums, int stride, const float* a, int a_stride, const float* b, int b_stride,
                          int depth, bool add) {
  Floats total[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) total[r][n] = add ? load(sums + r * stride + n * LANES) : Floats{};
  for (int k = 0; k < depth; k++) {
    Floats x[N];
    for (int n = 0; n < N; n++) x[n] = load(b + k * b_stride + n * LANES);
    for (int r = 0; r < R; r++) {
      Floats y = broadcast(a[r * a_stride + k]);
      for (int n = 0; n < N; n++) total[r][n] += y * x[n];
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(sums + r * stride + n * LANES, total[r][n]);
}

template <int N>
void product_columns(float* sums, int stride, const float* a, int a_stride, const float* b, int b_stride, int rows,
                     int depth, bool add) {
  int r = 0;
  for (; r + PRODUCT_ROWS <= rows; r += PRODUCT_ROWS)
    product_block<PRODUCT_ROWS, N>(sums + r * stride, stride, a + r * a_stride, a_stride, b, b_stride, depth, add);
  sums += r * stride, a += r * a_stride;
  switch (rows - r) {
    case 1: product_block<1, N>(sums, stride, a, a_stride, b, b_stride, depth, add); break;
    case 2: product_block<2, N>(sums, stride, a, a_stride, b, b_stride, depth, add); break;
    case 3: product_block<3, N>(sums, stride, a, a_stride, b, b_stride, depth, add); break;
  }
}

// sums [rows, columns] (+)= a [rows, depth] b [depth, columns], columns a multiple of LANES. Every sum runs over
// `depth` in order.
inline void product(float* sums, int stride, const float* a, int a_stride, const float* b, int b_stride, int rows,
                    int depth, int columns, bool add) {
  int at = 0;
  for (; at + PRODUCT_VECTORS * LANES <= columns; at += PRODUCT_VECTORS * LANES)
    product_columns<PRODUCT_VECTORS>(sums + at, stride, a, a_stride, b + at, b_stride, rows, depth, add);
  for (; at < columns; at += LANES)
    product_columns<1>(sums + at, stride, a, a_stride, b + at, b_stride, rows, depth, add);
}

}  // namespace nybble
