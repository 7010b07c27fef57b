// The inverse by blocked Gauss-Jordan elimination: of K columns at a time the LU factors with
// partial pivoting, then every other column by triangular solves and one product of inner length K.
#pragma once

#include "../math/dense.h"
#include "gemm.h"
#include "shuffle.h"

namespace fedrot {
inline namespace FEDROT_ISA {

constexpr int largest_block = 16;  // columns that are eliminated at once

template <class T>
inline void exchange(T& x, T& y) {
  const T old = x;
  x = y;
  y = old;
}

// LU with partial pivoting of rows c.. of the K columns `panel` (stride ld, n rows) that are
// columns c.. of a matrix. swaps[k]: the row that row c + k changed places with. Returns the sign
// of the permutation and the pivots, 0 where a pivot is zero.
template <int K, class T>
inline int factor_panel(int n, int c, T* panel, int ld, int* swaps) {
  int sign = 1;
  for (int k = 0; k < K; ++k) {
    T* column = panel + k * ld;
    const int at = c + k, p = largest_at(column, at, n);
    if (p != at)
      for (int j = 0; j < K; ++j) exchange(panel[j * ld + at], panel[j * ld + p]);
    swaps[k] = p;
    const T pivot = column[at];
    if (!(magnitude(pivot) > 0)) return 0;
    if ((p != at) != (pivot < 0)) sign = -sign;
    const T scale = 1 / pivot;
    for (int i = at + 1; i < n; i += lanes<T>) store(column + i, load(column + i) * scale);
    for (int j = k + 1; j < K; ++j) {
      T* other = panel + j * ld;
      const T by = other[at];
      for (int i = at + 1; i < n; i += lanes<T>)
        store(other + i, load(other + i) - load(column + i) * by);
    }
  }
  return sign;
}

// One step of the blocked Gauss-Jordan inversion of Y (n, n): columns c .. c + K.
template <int K, class T>
inline int invert_block(int n, int c, T* Y, int ld, T* panel, T* Z, int* order) {
  constexpr int L = lanes<T>;
  const int height = ld + L;  // of a panel column
  // The columns move out of the way, so that the same update does every element.
  for (int i = 0; i < n; i += L)
    for (int k = 0; k < K; k += L) {
      Vector<T> tile[L];
      for (int t = 0; t < L; ++t)
        tile[t] = i + t < n ? load(Y + (i + t) * ld + c + k) : Vector<T>{};
      transpose<T>(tile);
      for (int t = 0; t < L && k + t < K; ++t) store(panel + (k + t) * height + i, tile[t]);
    }
  int swaps[K] = {};
  const int sign = factor_panel<K>(n, c, panel, height, swaps);
  if (sign == 0) return 0;
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < K; ++k) Y[i * ld + c + k] = 0;
  for (int k = 0; k < K; ++k) {
    const int p = swaps[k], at = c + k;
    if (p == at) continue;
    exchange(order[at], order[p]);
    for (int j = 0; j < ld; j += L) {
      const Vector<T> row = load(Y + p * ld + j);
      store(Y + p * ld + j, load(Y + at * ld + j));
      store(Y + at * ld + j, row);
    }
  }
  T inverse_pivots[K];
  for (int k = 0; k < K; ++k) {
    Y[(c + k) * ld + c + k] = 1;
    inverse_pivots[k] = 1 / panel[k * height + c + k];
  }
  // Rows c .. c + K: Z <- L^-1 (...) for the rows below, Y <- U^-1 Z for those above.
  for (int j = 0; j < ld; j += L) {
    Vector<T> z[K];
    FEDROT_UNROLL
    for (int k = 0; k < K; ++k) z[k] = load(Y + (c + k) * ld + j);
    FEDROT_UNROLL
    for (int k = 0; k < K; ++k) {
      FEDROT_UNROLL
      for (int i = k + 1; i < K; ++i) z[i] -= panel[k * height + c + i] * z[k];
      store(Z + k * ld + j, z[k]);
    }
    FEDROT_UNROLL
    for (int k = K - 1; k >= 0; --k) {
      z[k] *= inverse_pivots[k];
      FEDROT_UNROLL
      for (int i = 0; i < k; ++i) z[i] -= panel[k * height + c + i] * z[k];
      store(Y + (c + k) * ld + j, z[k]);
    }
  }
  subtract_product(n - c - K, ld, K, panel + c + K, 1, height, Z, ld, Y + (c + K) * ld, ld);
  subtract_product(c, ld, K, panel, 1, height, Y + c * ld, ld, Y, ld);
  return sign;
}

// Y (n, n; row stride ld, whole vectors, the padding zero) <- Y^-1 with its columns in another
// order: column i belongs to column order[i] of the inverse. Returns the sign of det Y, or 0 where
// a pivot is zero.
template <class T>
inline int invert(int n, T* Y, int ld, T* panel, T* Z, int* order) {
  for (int i = 0; i < n; ++i) order[i] = i;
  int sign = 1;
  for (int c = 0; c < n && sign != 0;) {
    const int rest = n - c;
    if (rest >= 16)
      sign *= invert_block<16>(n, c, Y, ld, panel, Z, order), c += 16;
    else if (rest >= 8)
      sign *= invert_block<8>(n, c, Y, ld, panel, Z, order), c += 8;
    else if (rest >= 4)
      sign *= invert_block<4>(n, c, Y, ld, panel, Z, order), c += 4;
    else
      sign *= invert_block<1>(n, c, Y, ld, panel, Z, order), c += 1;
  }
  return sign;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
