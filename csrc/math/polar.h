// Orthogonal Procrustes for one square matrix, whatever its rank.
//   full rank:       R = polar(M) by Newton; det R = -1 where +1 is wanted flips the direction of
//                    the smallest singular value
//   rank-deficient:  R = lim eps->0+ polar(M + eps I). With the complete orthogonal decomposition
//                    M = U [T 0; 0 0] V^T that limit is U [polar(T) 0; 0 C] V^T, where
//                    C = polar(U_2^T V_2) joins the null spaces: the same problem, but smaller.
#pragma once

#include "newton.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Elements of T and of int that polar() and soft_rotation() need beside the matrices.
constexpr int workspace_matrices = 9;
FEDROT_HD constexpr long workspace_size(int n) { return long(workspace_matrices) * n * n + n; }

// v <- the eigenvector of the largest eigenvalue of P, symmetric and positive semidefinite, with
// Frobenius norm `norm`, by power iteration from the v given (unit). Returns false where that takes
// too long or where it is not certain that no other eigenvalue is larger. image: n elements.
template <class T, class G>
FEDROT_HD bool dominant_eigenvector(const G& g, int n, const T* P, T norm, T* v, T* image) {
  const int max_steps = 4 + n / 4;  // by then squaring P is cheaper
  const T tolerance = 4 * n * epsilon<T>() * epsilon<T>();
  for (int step = 0; step < max_steps; ++step) {
    multiply_symmetric(g, n, P, v, image);
    const T value = g.template sum<T>(n, [=](int i) { return image[i] * v[i]; });
    const T residual = g.template sum<T>(n, [=](int i) {
      const T difference = image[i] - value * v[i];
      return difference * difference;
    });
    const T length = std::sqrt(g.template sum<T>(n, [=](int i) { return image[i] * image[i]; }));
    g.sync();
    g.each(n, [=](int i) { v[i] = image[i] / length; });
    g.sync();
    // norm^2 is the sum of all squared eigenvalues: what is left for another is less than this one.
    if (residual <= tolerance * value * value) return norm * norm < 2 * value * value;
  }
  return false;
}

// Orthogonal R with the wrong determinant: R <- R (I - 2 v v^T), v the direction of the smallest
// singular value of M. `inverse` = M^-1 up to a positive factor; P, Q are n * n, v is n.
// M^-1 R = V S^-1 V^T, whose largest eigenvalue is sought; squaring the matrix doubles the gap.
template <class T, class G>
FEDROT_HD_LARGE void flip_smallest(const G& g, int n, T* R, const T* inverse, T* P, T* Q, T* v) {
  constexpr int max_squarings =
      sizeof(T) == 4 ? 24 : 53;  // tells singular values apart down to a gap of one rounding
  multiply(g, n, n, n, inverse, n, R, n, Q, n);
  for (int step = 0;; ++step) {
    const T trace = g.template sum<T>(n, [=](int i) { return Q[i * n + i]; });
    const T scale = 1 / (2 * trace);
    g.each(n, n, [=](int i, int j) { P[i * n + j] = scale * (Q[i * n + j] + Q[j * n + i]); });
    g.sync();
    const int j = g.argmax(0, n, [=](int i) { return P[i * n + i]; });
    const T length =
        std::sqrt(g.template sum<T>(n, [=](int i) { return P[i * n + j] * P[i * n + j]; }));
    g.each(n, [=](int i) { v[i] = P[i * n + j] / length; });
    g.sync();
    const T norm = frobenius(g, n * n, P);  // 1 for a matrix of rank one and trace 1
    if (norm * norm > 1 - 4 * epsilon<T>() || step == max_squarings) break;
    if (dominant_eigenvector(g, n, P, norm, v, Q)) break;
    multiply(g, n, n, n, P, n, P, n, Q, n);
  }
  T* image = Q;
  g.each(n, [=](int i) {
    T total = 0;
    for (int p = 0; p < n; ++p) total += R[i * n + p] * v[p];
    image[i] = total;
  });
  g.sync();
  g.each(n, n, [=](int i, int p) { R[i * n + p] -= 2 * image[i] * v[p]; });
  g.sync();
}

// Householder: v (length m) such that (I - 2 v v^T) x is a multiple of e_0. x has stride `step`.
template <class T, class G>
FEDROT_HD_LARGE void householder(const G& g, int m, const T* x, int step, T* v) {
  const T norm = std::sqrt(g.template sum<T>(m, [=](int i) { return x[i * step] * x[i * step]; }));
  const T x0 = x[0], v0 = x0 + (x0 < 0 ? -norm : norm);
  const T length = std::sqrt(2 * norm * (norm + magnitude(x0)));
  g.sync();
  g.each(m, [=](int i) { v[i] = length > 0 ? (i == 0 ? v0 : x[i * step]) / length : T(i == 0); });
  g.sync();
}

// X (m, n; row stride ld) <- (I - 2 v v^T) X
template <class T, class G>
FEDROT_HD void reflect_rows(const G& g, int m, int n, T* X, int ld, const T* v) {
  g.each(n, [=](int j) {
    T dot = 0;
    for (int i = 0; i < m; ++i) dot += v[i] * X[i * ld + j];
    for (int i = 0; i < m; ++i) X[i * ld + j] -= 2 * dot * v[i];
  });
  g.sync();
}

// X (m, n; row stride ld) <- X (I - 2 v v^T)
template <class T, class G>
FEDROT_HD_LARGE void reflect_columns(const G& g, int m, int n, T* X, int ld, const T* v) {
  g.each(m, [=](int i) {
    T dot = 0;
    for (int j = 0; j < n; ++j) dot += v[j] * X[i * ld + j];
    for (int j = 0; j < n; ++j) X[i * ld + j] -= 2 * dot * v[j];
  });
  g.sync();
}

// X (m, m) = U [T 0; 0 0] V^T with T (rank, rank), in place: X <- [T 0; 0 0]. Rows and columns
// below tolerance times `scale` (times the largest column where scale is 0) count as zero.
// Returns the rank; sign is multiplied by det U det V. order: m integers, v: m, Y: m * m.
template <class T, class G>
FEDROT_HD_LARGE int orthogonal_decomposition(const G& g, int m, T* X, T scale, T tolerance, T* U,
                                             T* V, T* Y, T* v, int* order, int& sign) {
  identity(g, m, U);
  identity(g, m, V);
  g.each(m, [=](int j) { order[j] = j; });
  g.sync();
  int rank = 0;
  for (; rank < m; ++rank) {  // QR with column pivoting
    const int k = rank;
    column_squares(g, m - k, m - k, X + k * m + k, m, Y);
    const int p = k + g.argmax(0, m - k, [=](int j) { return Y[j]; });
    const T largest = std::sqrt(Y[p - k]);
    g.sync();
    if (k == 0 && !(scale > 0)) scale = largest;
    if (!(largest > tolerance * scale)) break;
    if (p != k) {
      g.each(m + 1, [=](int i) {
        if (i == m) {
          const int o = order[k];
          order[k] = order[p];
          order[p] = o;
          return;
        }
        const T t = X[i * m + k];
        X[i * m + k] = X[i * m + p];
        X[i * m + p] = t;
      });
      g.sync();
    }
    householder(g, m - k, X + k * m + k, m, v);
    reflect_rows(g, m - k, m - k, X + k * m + k, m, v);
    reflect_columns(g, m, m - k, U + k, m, v);
    sign = -sign;
  }
  // Columns back in their own order, what is below the triangle is zero.
  g.each(m, m,
         [=](int i, int j) { Y[i * m + order[j]] = (i < rank && j >= i) ? X[i * m + j] : T(0); });
  g.sync();
  copy(g, m * m, Y, X);
  for (int k = 0; k < rank; ++k) {  // LQ
    householder(g, m - k, X + k * m + k, 1, v);
    reflect_columns(g, rank - k, m - k, X + k * m + k, m, v);
    reflect_columns(g, m, m - k, V + k, m, v);
    sign = -sign;
  }
  return rank;
}

// X <- X / max |X|, so that no norm over- or underflows.
template <class T, class G>
FEDROT_HD void normalize(const G& g, int count, T* X) {
  const int at = g.argmax(0, count, [=](int e) { return magnitude(X[e]); });
  const T largest = magnitude(X[at]);
  g.sync();
  if (!(largest > 0) || largest * 0 != 0) return;  // zero or not finite
  g.each(count, [=](int e) { X[e] /= largest; });  // 1 / largest may overflow
  g.sync();
}

// X <- the orthogonal matrix closest to X in the sense above, n x n.
//   det        +1 or -1: the determinant wanted; 0: either
//   scale      what `tolerance` is relative to; 0: X itself
//   work       workspace_size(n) elements; pivots: n integers
template <class T, class G>
FEDROT_HD_LARGE void polar(const G& g, int n, T* X, int det, T scale, T tolerance, T* work,
                           int* pivots) {
  const int count = n * n;
  T *M = work, *inverse = M + count, *Q = inverse + count, *U = Q + count, *V = U + count,
    *left = V + count, *right = left + count, *total = right + count, *P = total + count,
    *v = P + count;  // v is also what newton_polar has behind P
  if (!(scale > 0)) normalize(g, count, X);
  copy(g, count, X, M);
  const int sign = newton_polar(g, n, X, scale, tolerance, inverse, P, pivots);
  if (sign != 0) {
    if (det != 0 && sign != det) flip_smallest(g, n, X, inverse, P, Q, v);
    return;
  }

  // Rank-deficient. `left` and `right` (n, m) span what is still to be joined, M (m, m) says how,
  // total (n, n) is what is already decided.
  identity(g, n, left);
  identity(g, n, right);
  g.each(count, [=](int e) { total[e] = 0; });
  g.sync();
  int m = n;
  while (true) {
    int signs = 1;
    const int rank = orthogonal_decomposition(g, m, M, scale, tolerance, U, V, P, v, pivots, signs);
    T* block = X;  // polar(T)
    const int done = rank == 0 ? m : rank;
    if (rank == 0) {  // no evidence left: the identity, reflected where the determinant asks
      identity(g, m, block);
      identity(g, m, U);
      identity(g, m, V);
      signs = 1;
      g.each(1, [=](int) {
        if (det == -1) block[m * m - 1] = -1;
      });
      g.sync();
    } else {
      g.each(rank, rank, [=](int i, int j) { block[i * rank + j] = M[i * m + j]; });
      g.sync();
      // T passed the rank test, so no second one: tolerance 0.
      const int block_sign = newton_polar(g, rank, block, T(0), T(0), inverse, P, pivots);
      if (det != 0) {
        if (rank == m && block_sign * signs != det) flip_smallest(g, rank, block, inverse, P, Q, v);
        if (rank < m) det *= block_sign * signs;
      }
    }
    // total += (left U_1) block (right V_1)^T
    multiply(g, n, m, done, left, m, U, m, P, done);
    multiply(g, n, done, done, P, done, block, done, Q, done);
    multiply(g, n, m, done, right, m, V, m, P, done);
    T *transposed = inverse, *product = M;
    g.each(n, done, [=](int i, int p) { transposed[p * n + i] = P[i * done + p]; });
    g.sync();
    multiply(g, n, done, n, Q, done, transposed, n, product, n);
    g.each(count, [=](int e) { total[e] += product[e]; });
    g.sync();
    if (done == m) break;
    // What is left: left <- left U_2, right <- right V_2, M <- U_2^T V_2
    const int rest = m - rank;
    multiply(g, n, m, rest, left, m, U + rank, m, P, rest);
    copy(g, n * rest, P, left);
    multiply(g, n, m, rest, right, m, V + rank, m, P, rest);
    copy(g, n * rest, P, right);
    multiply_tn(g, rest, m, rest, U + rank, m, V + rank, m, M, rest);
    m = rest;
    scale = 1;
  }
  copy(g, count, total, X);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
