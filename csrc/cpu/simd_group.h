// The r x r stage for larger r: vectors run along the rows of one matrix. Simd is the group that
// math/ is given here; the overloads below replace what takes the time there, on copies whose
// rows are whole vectors.
#pragma once

#include <cmath>

#include "../math/polar.h"
#include "invert.h"

namespace fedrot {
inline namespace FEDROT_ISA {

template <class T>
struct Simd : Serial {
  T* memory;  // scratch(n) elements, aligned to whole vectors
  explicit Simd(T* aligned) : memory(aligned) {}

  // As Serial::sum, but in as many partial sums as fill a few vectors.
  template <class U, class F>
  U sum(int n, F f) const {
    constexpr int width = 2 * lanes<T>;
    if (n < width) return Serial::sum<U>(n, f);
    U parts[width] = {};
    int i = 0;
    for (; i + width <= n; i += width) {
      FEDROT_INDEPENDENT
      for (int t = 0; t < width; ++t) parts[t] += f(i + t);
    }
    for (int t = 0; i < n; ++i, ++t) parts[t] += f(i);
    for (int half = width / 2; half > 0; half /= 2)
      for (int t = 0; t < half; ++t) parts[t] += parts[t + half];
    return parts[0];
  }

  // Row stride of a padded copy: whole vectors, the padding zero.
  static int stride(int n) { return (n + lanes<T> - 1) / lanes<T> * lanes<T>; }
  static std::size_t matrix(int n) { return std::size_t(n) * stride(n) + lanes<T>; }
  static std::size_t scratch(int n) {
    return 2 * matrix(n) + 2 * largest_block * (stride(n) + lanes<T>);
  }
};

template <class T>
inline void pad(int rows, int cols, const T* from, int ld, T* to) {
  const int stride = Simd<T>::stride(cols);
  for (int i = 0; i < rows; ++i) {
    std::memcpy(to + i * stride, from + i * ld, cols * sizeof(T));
    for (int j = cols; j < stride; ++j) to[i * stride + j] = 0;
  }
}

template <class T>
inline void unpad(int rows, int cols, const T* from, T* to, int ld) {
  for (int i = 0; i < rows; ++i)
    std::memcpy(to + i * ld, from + i * Simd<T>::stride(cols), cols * sizeof(T));
}

template <class T>
inline T norm_padded(int count, const T* X) {
  Vector<T> sums[4] = {};
  for (int e = 0; e < count; e += lanes<T>) {
    const Vector<T> x = load(X + e);
    sums[e / lanes<T> % 4] += x * x;
  }
  return std::sqrt(horizontal_sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// newton_polar() of math/newton.h.
template <class T>
inline int newton_polar(const Simd<T>& g, int n, T* given, T scale, T tolerance, T* inverse,
                        T* work, int* order) {
  constexpr int L = lanes<T>, max_steps = 40;
  const int ld = Simd<T>::stride(n), count = n * ld;
  T *X = g.memory, *Y = X + Simd<T>::matrix(n), *panel = Y + Simd<T>::matrix(n),
    *Z = panel + largest_block * (ld + L);
  if (!(scale > 0)) scale = largest_column(g, n, given, work);
  pad(n, n, given, n, X);
  for (int e = 0; e < largest_block * (ld + L); ++e) panel[e] = 0;
  int sign = 0;
  for (int step = 0; step < max_steps; ++step) {
    std::memcpy(Y, X, count * sizeof(T));
    const int det = invert(n, Y, ld, panel, Z, order);
    if (det == 0) return 0;
    const T norm_x = norm_padded(count, X), norm_y = norm_padded(count, Y);
    if (step == 0) {
      sign = det;
      if (!(norm_y * scale * tolerance < 1)) return 0;
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) inverse[i * n + order[j]] = Y[i * ld + j];
    }
    const T gain = std::sqrt(norm_y / norm_x), a = gain / 2, b = 1 / (2 * gain);
    Vector<T> change{};
    for (int i = 0; i < n; i += L)
      for (int j = 0; j < ld; j += L) {
        Vector<T> tile[L];
        for (int t = 0; t < L; ++t) tile[t] = j + t < n ? load(Y + (j + t) * ld + i) : Vector<T>{};
        transpose<T>(tile);
        for (int t = 0; t < L && i + t < n; ++t) {
          T* row = X + order[i + t] * ld + j;
          const Vector<T> old = load(row), next = a * old + b * tile[t];
          change += (next - old) * (next - old);
          store(row, next);
        }
      }
    if (horizontal_sum<T>(change) <= epsilon<T>() * n) break;
  }
  unpad(n, n, X, given, n);
  return sign;
}

// multiply() of math/dense.h.
template <class T>
inline void multiply(const Simd<T>& g, int rows, int inner, int cols, const T* A, int lda,
                     const T* B, int ldb, T* C, int ldc) {
  const int ld = Simd<T>::stride(cols);
  T *Y = g.memory, *product = Y + inner * ld;
  pad(inner, cols, B, ldb, Y);
  for (int e = 0; e < inner * ld; ++e) Y[e] = -Y[e];
  for (int e = 0; e < rows * ld; ++e) product[e] = 0;
  subtract_product(rows, ld, inner, A, lda, 1, Y, ld, product, ld);
  unpad(rows, cols, product, C, ldc);
}

template <int Q, class T>
inline void symmetric_tile(int n, const T* P, const T* x, T* y) {
  Vector<T> sums[Q] = {};
  for (int i = 0; i < n; ++i)
    for (int q = 0; q < Q; ++q) sums[q] += load(P + i * n + q * lanes<T>) * x[i];
  for (int q = 0; q < Q; ++q) store(y + q * lanes<T>, sums[q]);
}

// multiply_symmetric() of math/dense.h.
template <class T>
inline void multiply_symmetric(const Simd<T>&, int n, const T* P, const T* x, T* y) {
  constexpr int L = lanes<T>;
  if (n < L) return multiply_symmetric(Serial{}, n, P, x, y);
  int j = 0;
  for (; j + 4 * L <= n; j += 4 * L) symmetric_tile<4>(n, P + j, x, y + j);
  for (; j + L <= n; j += L) symmetric_tile<1>(n, P + j, x, y + j);
  if (j < n) symmetric_tile<1>(n, P + n - L, x, y + n - L);  // some of them once more
}

// column_squares() of math/dense.h.
template <class T>
inline void column_squares(const Simd<T>&, int rows, int cols, const T* X, int ld, T* squares) {
  int j = 0;
  for (; j + lanes<T> <= cols; j += lanes<T>) {
    Vector<T> total{};
    for (int i = 0; i < rows; ++i) {
      const Vector<T> x = load(X + i * ld + j);
      total += x * x;
    }
    store(squares + j, total);
  }
  column_squares(Serial{}, rows, cols - j, X + j, ld, squares + j);
}

// reflect_rows() of math/polar.h.
template <class T>
inline void reflect_rows(const Simd<T>&, int m, int n, T* X, int ld, const T* v) {
  int j = 0;
  for (; j + lanes<T> <= n; j += lanes<T>) {
    Vector<T> dot{};
    for (int i = 0; i < m; ++i) dot += v[i] * load(X + i * ld + j);
    dot *= 2;
    for (int i = 0; i < m; ++i) store(X + i * ld + j, load(X + i * ld + j) - v[i] * dot);
  }
  reflect_rows(Serial{}, m, n - j, X + j, ld, v);
}

// reflect_columns() of math/polar.h.
template <class T>
inline void reflect_columns(const Simd<T>&, int m, int n, T* X, int ld, const T* v) {
  for (int i = 0; i < m; ++i) {
    T* row = X + i * ld;
    Vector<T> sums{};
    int j = 0;
    for (; j + lanes<T> <= n; j += lanes<T>) sums += load(v + j) * load(row + j);
    T dot = horizontal_sum<T>(sums);
    for (; j < n; ++j) dot += v[j] * row[j];
    dot *= 2;
    for (j = 0; j + lanes<T> <= n; j += lanes<T>) store(row + j, load(row + j) - dot * load(v + j));
    for (; j < n; ++j) row[j] -= dot * v[j];
  }
}

// normalize() of math/polar.h.
template <class T>
inline void normalize(const Simd<T>&, int count, T* X) {
  constexpr int L = lanes<T>;
  Vector<T> largest{};
  int e = 0;
  for (; e + L <= count; e += L) {
    const Vector<T> size = magnitude_of<T>(load(X + e));
    largest = size > largest ? size : largest;
  }
  T parts[L], most = 0;
  store(parts, largest);
  for (T part : parts) most = part > most ? part : most;
  for (; e < count; ++e) most = magnitude(X[e]) > most ? magnitude(X[e]) : most;
  if (most > 0)
    for (e = 0; e < count; ++e) X[e] /= most;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
