// The r x r stage for small r: as many matrices at once as a vector has lanes, element (i, j) of
// all of them in one vector. The mathematics is that of math/polar.h. Every lane pivots, converges
// and stops by itself, so a matrix comes out the same whatever its neighbours; one that needs the
// rank-deficient branch is left to math/polar.h.
#pragma once

#include <cmath>

#include "../math/dense.h"
#include "simd.h"

namespace fedrot {
inline namespace FEDROT_ISA {

template <class M>
inline bool any(M mask) {
  long long parts[sizeof mask / sizeof(long long)], all = 0;
  std::memcpy(parts, &mask, sizeof mask);
  for (long long part : parts) all |= part;
  return all != 0;
}

template <class T>
inline Vector<T> square_root(Vector<T> x) {
  T parts[lanes<T>];
  std::memcpy(parts, &x, sizeof x);
  for (T& part : parts) part = std::sqrt(part);
  return load(parts);
}

template <class M, class V>
inline void exchange(M where, V& x, V& y) {
  const V old = x;
  x = where ? y : x;
  y = where ? old : y;
}

// The order of a matrix, known to the compiler or (0) not.
template <int order>
struct Order {
  static constexpr int n = order;
  explicit Order(int) {}
};
template <>
struct Order<0> {
  const int n;
  explicit Order(int order) : n(order) {}
};

// f(integral_constant n) up to `known`, beyond it f(integral_constant 0).
template <int known, class F>
inline auto with_order(int n, F f) {
  if constexpr (known > 0)
    if (n <= known)
      return n == known ? f(std::integral_constant<int, known>{}) : with_order<known - 1>(n, f);
  return f(std::integral_constant<int, 0>{});
}

// lanes<T> matrices (n, n) at work.
template <class T, int order>
class Lanes : Order<order> {
 public:
  using V = Vector<T>;
  using M = Mask<T>;
  using Order<order>::n;

  static std::size_t scratch(int n) { return 4 * n * n + 3 * n; }  // vectors

  Lanes(int size, V* memory)
      : Order<order>(size),
        X(memory),
        inverse(X + n * n),
        W(inverse + n * n),
        P(W + n * n),
        v(P + n * n),
        image(v + n),
        pivots(reinterpret_cast<M*>(image + n)) {}

  // X <- `count` matrices at `from`, n * n elements apart; the other lanes hold identities.
  void gather(int count, const T* from) {
    for (int e = 0; e < n * n; ++e) X[e] = V{} + T(e % (n + 1) == 0);
    for (int c = 0; c < count; ++c)
      for (int e = 0; e < n * n; ++e) X[e][c] = from[c * n * n + e];
  }

  // The reverse, where `mask` says.
  void scatter(int count, T* to, M mask) const {
    for (int c = 0; c < count; ++c)
      if (mask[c])
        for (int e = 0; e < n * n; ++e) to[c * n * n + e] = X[e][c];
  }

  M finite() const {
    V zero{};
    for (int e = 0; e < n * n; ++e) zero += X[e] * 0;
    return zero == 0;
  }

  // X <- X / max |X|; false where X is zero.
  M normalize() {
    V largest{};
    for (int e = 0; e < n * n; ++e) {
      const V size = magnitude_of<T>(X[e]);
      largest = size > largest ? size : largest;
    }
    for (int e = 0; e < n * n; ++e) X[e] /= largest;
    return largest > 0;
  }

  // X <- (1 - lam) I + lam X
  void soften(T lam) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) X[i * n + j] = lam * X[i * n + j] + (i == j) * (1 - lam);
  }

  // X <- the orthogonal polar factor of X, with determinant +1 where `proper`; see polar().
  // Returns where that worked; the lanes outside `wanted` do not matter.
  M polar(M wanted, bool proper, T scale, T tolerance) {
    V sign{};
    const M done = newton_polar(wanted, scale, tolerance, sign);
    const M wrong = done & (sign < 0);
    if (proper && any(wrong)) flip_smallest(wrong);
    return done;
  }

 private:
  // Y <- Y^-1, sign <- that of det Y. Returns where every pivot was nonzero.
  M invert(V* Y, V& sign) {
    sign = V{} + 1;
    M good = sign > 0;
    for (int c = 0; c < n; ++c) {
      V largest = magnitude_of<T>(Y[c * n + c]);
      M at = M{} + c;
      for (int i = c + 1; i < n; ++i) {
        const V size = magnitude_of<T>(Y[i * n + c]);
        const M larger = size > largest;
        largest = larger ? size : largest;
        at = larger ? M{} + i : at;
      }
      pivots[c] = at;
      if (any(at != c))
        for (int i = c + 1; i < n; ++i) {
          const M here = at == i;
          for (int j = 0; j < n; ++j) exchange(here, Y[c * n + j], Y[i * n + j]);
        }
      const V pivot = Y[c * n + c], factor = 1 / pivot;
      good &= largest > 0;
      sign = (at != c) ^ (pivot < 0) ? -sign : sign;
      for (int j = 0; j < n; ++j) Y[c * n + j] *= factor;
      Y[c * n + c] = factor;
      for (int i = 0; i < n; ++i) {
        if (i == c) continue;
        const V by = Y[i * n + c];
        Y[i * n + c] = V{};
        for (int j = 0; j < n; ++j) Y[i * n + j] -= by * Y[c * n + j];
      }
    }
    for (int c = n - 1; c >= 0; --c) {
      const M at = pivots[c];
      if (!any(at != c)) continue;
      for (int i = c + 1; i < n; ++i) {
        const M here = at == i;
        for (int k = 0; k < n; ++k) exchange(here, Y[k * n + c], Y[k * n + i]);
      }
    }
    return good;
  }

  V norm(const V* Y) const {
    V total{};
    for (int e = 0; e < n * n; ++e) total += Y[e] * Y[e];
    return square_root<T>(total);
  }

  V largest_column() const {
    V largest{};
    for (int j = 0; j < n; ++j) {
      V total{};
      for (int i = 0; i < n; ++i) total += X[i * n + j] * X[i * n + j];
      largest = total > largest ? total : largest;
    }
    return square_root<T>(largest);
  }

  // X <- polar factor, `inverse` <- X^-1, as in math/newton.h. Returns where X is not singular.
  M newton_polar(M wanted, T scale, T tolerance, V& sign) {
    constexpr int max_steps = 40;
    const V largest = scale > 0 ? V{} + scale : largest_column();
    M active = wanted, regular = wanted;
    for (int step = 0; step < max_steps && any(active); ++step) {
      V* Y = step == 0 ? inverse : W;
      for (int e = 0; e < n * n; ++e) Y[e] = X[e];
      V det;
      M good = invert(Y, det);
      const V norm_x = norm(X), norm_y = norm(Y);
      if (step == 0) {
        sign = det;
        good &= norm_y * largest * tolerance < 1;
      }
      regular &= good | ~active;
      active &= good;
      const V gain = square_root<T>(norm_y / norm_x), a = gain / 2, b = 1 / (2 * gain);
      V change{};
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
          const V old = X[i * n + j], next = a * old + b * Y[j * n + i];
          change += (next - old) * (next - old);
          X[i * n + j] = active ? next : old;
        }
      active &= change > epsilon<T>() * n;
    }
    return regular;
  }

  // X <- X (I - 2 v v^T) where `wrong`, v the direction of the smallest singular value.
  void flip_smallest(M wrong) {
    constexpr int max_squarings = sizeof(T) == 4 ? 24 : 53;
    multiply(inverse, X, W);
    M active = wrong;
    for (int step = 0;; ++step) {
      V trace{}, squares{};
      for (int i = 0; i < n; ++i) trace += W[i * n + i];
      const V factor = 1 / (2 * trace);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j) {
          const V next = factor * (W[i * n + j] + W[j * n + i]);
          squares += T(i == j ? 1 : 2) * next * next;
          P[i * n + j] = P[j * n + i] = active ? next : P[i * n + j];
        }
      active &= squares <= 1 - 4 * epsilon<T>();
      if (step == max_squarings || !any(active)) break;
      multiply(P, P, W);
    }
    V largest{}, total{};
    for (int j = 0; j < n; ++j) {
      const M larger = P[j * n + j] > largest;
      largest = larger ? P[j * n + j] : largest;
      for (int i = 0; i < n; ++i) v[i] = larger ? P[j * n + i] : v[i];
    }
    for (int i = 0; i < n; ++i) total += v[i] * v[i];
    const V length = square_root<T>(total);
    for (int i = 0; i < n; ++i) v[i] /= length;
    for (int i = 0; i < n; ++i) {
      V dot{};
      for (int j = 0; j < n; ++j) dot += X[i * n + j] * v[j];
      for (int j = 0; j < n; ++j)
        X[i * n + j] = wrong ? X[i * n + j] - 2 * dot * v[j] : X[i * n + j];
    }
  }

  void multiply(const V* A, const V* B, V* C) {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) C[i * n + j] = A[i * n] * B[j];
      for (int p = 1; p < n; ++p)
        for (int j = 0; j < n; ++j) C[i * n + j] += A[i * n + p] * B[p * n + j];
    }
  }

  V *X, *inverse, *W, *P, *v, *image;
  M* pivots;
};

}  // namespace FEDROT_ISA
}  // namespace fedrot
