// Small dense helpers on row-major matrices, for any group.
#pragma once

#include <cmath>

#include "group.h"

namespace fedrot {
inline namespace FEDROT_ISA {

template <class T>
FEDROT_HD constexpr T epsilon() {
  return sizeof(T) == 4 ? T(1.1920928955078125e-07) : T(2.220446049250313e-16);
}

template <class T>
FEDROT_HD T magnitude(T x) {
  return x < 0 ? -x : x;
}

template <class T, class G>
FEDROT_HD T frobenius(const G& g, int count, const T* X) {
  return std::sqrt(g.template sum<T>(count, [=](int i) { return X[i] * X[i]; }));
}

template <class T, class G>
FEDROT_HD void copy(const G& g, int count, const T* from, T* to) {
  g.each(count, [=](int i) { to[i] = from[i]; });
  g.sync();
}

template <class T, class G>
FEDROT_HD void identity(const G& g, int n, T* X) {
  g.each(n, n, [=](int i, int j) { X[i * n + j] = T(i == j); });
  g.sync();
}

// C (rows, cols) = A (rows, inner) B (inner, cols); ld* are row strides.
template <class T, class G>
FEDROT_HD_LARGE void multiply(const G& g, int rows, int inner, int cols, const T* A, int lda,
                              const T* B, int ldb, T* C, int ldc) {
  g.each(rows, cols, [=](int i, int j) { C[i * ldc + j] = 0; });
  g.sync();
  for (int p = 0; p < inner; ++p) {
    g.each(rows, cols, [=](int i, int j) { C[i * ldc + j] += A[i * lda + p] * B[p * ldb + j]; });
    g.sync();
  }
}

// C (rows, cols) = A (inner, rows)^T B (inner, cols).
template <class T, class G>
FEDROT_HD void multiply_tn(const G& g, int rows, int inner, int cols, const T* A, int lda,
                           const T* B, int ldb, T* C, int ldc) {
  g.each(rows, cols, [=](int i, int j) {
    T total = 0;
    for (int p = 0; p < inner; ++p) total += A[p * lda + i] * B[p * ldb + j];
    C[i * ldc + j] = total;
  });
  g.sync();
}

// y = P x for a symmetric P (n, n); x and y are different.
template <class T, class G>
FEDROT_HD void multiply_symmetric(const G& g, int n, const T* P, const T* x, T* y) {
  g.each(n, [=](int i) {
    T total = 0;
    for (int p = 0; p < n; ++p) total += P[p * n + i] * x[p];
    y[i] = total;
  });
  g.sync();
}

// squares[j] = the squared norm of column j of X (rows, cols) with row stride ld.
template <class T, class G>
FEDROT_HD void column_squares(const G& g, int rows, int cols, const T* X, int ld, T* squares) {
  g.each(cols, [=](int j) {
    T total = 0;
    for (int i = 0; i < rows; ++i) total += X[i * ld + j] * X[i * ld + j];
    squares[j] = total;
  });
  g.sync();
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
