// The orthogonal polar factor of a nonsingular X by Newton's iteration with Frobenius scaling,
//   X <- (g X + X^-T / g) / 2,   g = sqrt(|X^-1| / |X|)        (Higham, SIAM J. Sci. Stat. 1986)
// The inverse is Gauss-Jordan with partial pivoting, which gives the sign of det X on the way.
// 2-9 steps for any condition that the working precision can tell from singular.
#pragma once

#include "dense.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// X <- X^-1 in place. Returns the sign of det X, or 0 where a pivot is zero (X is then spoilt).
// column: n elements, pivots: n integers.
template <class T, class G>
FEDROT_HD int invert(const G& g, int n, T* X, T* column, int* pivots) {
  int sign = 1;
  for (int c = 0; c < n; ++c) {
    const int p = g.argmax(c, n, [=](int i) { return magnitude(X[i * n + c]); });
    const T pivot = X[p * n + c];
    g.sync();
    if (!(magnitude(pivot) > 0)) return 0;
    if ((p != c) != (pivot < 0)) sign = -sign;
    // Row c <- pivot row / pivot, with 1 / pivot in its own place; row p <- the old row c.
    const T scale = 1 / pivot;
    g.each(n, [=](int j) {
      const T from_p = X[p * n + j], from_c = X[c * n + j];
      X[p * n + j] = from_c;
      X[c * n + j] = (j == c ? T(1) : from_p) * scale;
    });
    g.sync();
    // The rest of column c moves out of the way, so that one rank-1 update does every element.
    g.each(n, [=](int i) {
      column[i] = i == c ? T(0) : X[i * n + c];
      if (i != c) X[i * n + c] = 0;
      if (i == c) pivots[c] = p;
    });
    g.sync();
    g.each(n, n, [=](int i, int j) { X[i * n + j] -= column[i] * X[c * n + j]; });
    g.sync();
  }
  for (int c = n - 1; c >= 0; --c) {
    const int p = pivots[c];
    if (p == c) continue;
    g.each(n, [=](int i) {
      const T t = X[i * n + c];
      X[i * n + c] = X[i * n + p];
      X[i * n + p] = t;
    });
    g.sync();
  }
  return sign;
}

// The largest norm of a column of X (n, n). squares: n elements.
template <class T, class G>
FEDROT_HD T largest_column(const G& g, int n, const T* X, T* squares) {
  column_squares(g, n, n, X, n, squares);
  const T largest = squares[g.argmax(0, n, [=](int j) { return squares[j]; })];
  g.sync();
  return std::sqrt(largest);
}

// X <- its orthogonal polar factor. Returns the sign of det X, or 0 where X is singular to working
// precision: |X^-1| times `scale` (times its largest column where scale is 0) above 1 / tolerance;
// X is then spoilt. `inverse` (n * n) receives X^-1 of the matrix given; work: n * n + n, pivots: n
// integers.
template <class T, class G>
FEDROT_HD_LARGE int newton_polar(const G& g, int n, T* X, T scale, T tolerance, T* inverse, T* work,
                                 int* pivots) {
  constexpr int max_steps = 40;  // never reached: 9 steps take condition 1e16 to the unit circle
  const int count = n * n;
  if (!(scale > 0)) scale = largest_column(g, n, X, work);
  int sign = 0;
  for (int step = 0; step < max_steps; ++step) {
    T* Y = step == 0 ? inverse : work;
    copy(g, count, X, Y);
    const int det = invert(g, n, Y, work + count, pivots);
    if (det == 0) return 0;
    const T norm_x = frobenius(g, count, X), norm_y = frobenius(g, count, Y);
    if (step == 0) {
      sign = det;
      if (!(norm_y * scale * tolerance < 1)) return 0;
    }
    const T gain = std::sqrt(norm_y / norm_x);
    const T a = gain / 2, b = 1 / (2 * gain);
    const T change = g.template sum<T>(count, [=](int e) {
      const int i = e / n, j = e - i * n;
      const T difference = (a - 1) * X[e] + b * Y[j * n + i];
      return difference * difference;
    });
    g.sync();
    g.each(n, n, [=](int i, int j) { X[i * n + j] = a * X[i * n + j] + b * Y[j * n + i]; });
    g.sync();
    // Quadratic: a step this small leaves an error of about its square, below one rounding.
    if (change <= epsilon<T>() * n) break;
  }
  return sign;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
