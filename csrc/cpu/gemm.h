// Matrix product for matrices in the cache, by register tiles.
#pragma once

#include "simd.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// C -= X Y for a tile of P rows and Q vectors; element (i, l) of X is X[i * x_row + l * x_inner].
template <int P, int Q, class T>
inline void gemm_tile(int inner, const T* X, int x_row, int x_inner, const T* Y, int ldy, T* C,
                      int ldc) {
  Vector<T> sums[P][Q];
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) sums[p][q] = load(C + p * ldc + q * lanes<T>);
  for (int l = 0; l < inner; ++l, X += x_inner, Y += ldy) {
    Vector<T> y[Q];
    for (int q = 0; q < Q; ++q) y[q] = load(Y + q * lanes<T>);
    for (int p = 0; p < P; ++p)
      for (int q = 0; q < Q; ++q) sums[p][q] -= X[p * x_row] * y[q];
  }
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) store(C + p * ldc + q * lanes<T>, sums[p][q]);
}

template <int Q, class T>
inline void gemm_columns(int rows, int inner, const T* X, int x_row, int x_inner, const T* Y,
                         int ldy, T* C, int ldc) {
  constexpr int P = vector_bytes == 64 ? 8 : 4;  // accumulators fill half of the registers
  int i = 0;
  for (; i + P <= rows; i += P)
    gemm_tile<P, Q>(inner, X + i * x_row, x_row, x_inner, Y, ldy, C + i * ldc, ldc);
  for (; i + 2 <= rows; i += 2)
    gemm_tile<2, Q>(inner, X + i * x_row, x_row, x_inner, Y, ldy, C + i * ldc, ldc);
  for (; i < rows; ++i)
    gemm_tile<1, Q>(inner, X + i * x_row, x_row, x_inner, Y, ldy, C + i * ldc, ldc);
}

// C (rows, cols) -= X (rows, inner) Y (inner, cols); cols is a multiple of the vector length.
template <class T>
inline void subtract_product(int rows, int cols, int inner, const T* X, int x_row, int x_inner,
                             const T* Y, int ldy, T* C, int ldc) {
  int j = 0;
  for (; j + 2 * lanes<T> <= cols; j += 2 * lanes<T>)
    gemm_columns<2>(rows, inner, X, x_row, x_inner, Y + j, ldy, C + j, ldc);
  if (j < cols) gemm_columns<1>(rows, inner, X, x_row, x_inner, Y + j, ldy, C + j, ldc);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
