// Covariance and apply where a whole row of B is shorter than a vector: r <= small_rank. Several
// positions of B share a vector as they lie in memory, and R rotations of the lanes within each
// position meet every pair (p, q) once.
#pragma once

#include "ahead.h"
#include "convert.h"
#include "shuffle.h"

namespace fedrot {
inline namespace FEDROT_ISA {

template <class Acc>
constexpr int small_rank = lanes<Acc> / 2;

// f(integral_constant r) for 1 <= r <= small_rank.
template <class Acc, int R = small_rank<Acc>, class F>
inline void with_rank(int r, F f) {
  if constexpr (R > 0) {
    if (r == R)
      f(std::integral_constant<int, R>{});
    else
      with_rank<Acc, R - 1>(r, f);
  }
}

// sums[p][q] += X[p][t] Y[q][t] lane by lane for P x Q entries; rows of sums are `cols` vectors.
// first: X has not been read before.
template <int P, int Q, class Acc, class T>
inline void dot_tile(bool first, int count, const T* X, std::int64_t x_row, const Acc* Y,
                     std::int64_t y_row, Acc* sums, int cols, Ahead& ahead) {
  Vector<Acc> s[P][Q], y[Q];
  FEDROT_UNROLL
  for (int p = 0; p < P; ++p) {
    FEDROT_UNROLL
    for (int q = 0; q < Q; ++q) s[p][q] = load(sums + (p * cols + q) * lanes<Acc>);
  }
  // Rank 4, of which only A is aligned, reads two thirds of a byte a multiply-add: 96 are a line.
  constexpr int multiply_adds = P * Q * lanes<Acc>, steps = (multiply_adds + 95) / 96;
  Stream stream =
      take(ahead, multiply_adds / steps, steps * ((count + lanes<Acc> - 1) / lanes<Acc>));
  const bool in_order = is_in_order(ahead) && first;
  for (int t = 0; t < count; t += lanes<Acc>) {
    const int left = count - t;
    auto load_at = [=](const auto* p) {
      return left >= lanes<Acc> ? load_as<Acc>(p + t) : load_partial_as<Acc>(p + t, left);
    };
    FEDROT_UNROLL
    for (int q = 0; q < Q; ++q) y[q] = load_at(Y + q * y_row);
    FEDROT_UNROLL
    for (int p = 0; p < P; ++p) {
      const Vector<Acc> x = load_at(X + p * x_row);
      if (in_order) fetch_later(X + p * x_row + t);
      FEDROT_UNROLL
      for (int q = 0; q < Q; ++q) s[p][q] += x * y[q];
    }
    unrolled<steps>([&](int) { advance(stream); });
  }
  FEDROT_UNROLL
  for (int p = 0; p < P; ++p) {
    FEDROT_UNROLL
    for (int q = 0; q < Q; ++q) store(sums + (p * cols + q) * lanes<Acc>, s[p][q]);
  }
}

template <int P, int Q, class Acc, class T>
inline void dot_columns(int cols, int from, int count, const T* X, std::int64_t x_row, const Acc* Y,
                        std::int64_t y_row, Acc* sums, Ahead& ahead) {
  for (; from + Q <= cols; from += Q)
    dot_tile<P, Q>(from == 0, count, X, x_row, Y + from * y_row, y_row, sums + from * lanes<Acc>,
                   cols, ahead);
  if constexpr (Q > 1)
    if (from < cols) dot_columns<P, Q - 1>(cols, from, count, X, x_row, Y, y_row, sums, ahead);
}

// sums (rows, cols, lanes) += X (rows, count) Y (cols, count)^T lane by lane.
template <class Acc, class T, int P = 4>
inline void dot_rows(int rows, int cols, int count, const T* X, std::int64_t x_row, const Acc* Y,
                     std::int64_t y_row, Acc* sums, Ahead& ahead) {
  constexpr int Q = vector_bytes == 64 ? 4 : 2;  // accumulators fill half to all of the registers
  for (; rows >= P; rows -= P, X += P * x_row, sums += P * cols * lanes<Acc>)
    dot_columns<P, Q>(cols, 0, count, X, x_row, Y, y_row, sums, ahead);
  if constexpr (P > 1)
    if (rows > 0) dot_rows<Acc, T, P - 1>(rows, cols, count, X, x_row, Y, y_row, sums, ahead);
}

// Lane g * R + p <- lane g * R + (p + s) % R.
template <int R, int s, class Acc, int... i>
inline Vector<Acc> turned(Vector<Acc> v, std::integer_sequence<int, i...>) {
  constexpr int used = lanes<Acc> / R * R;
  return shuffle<(i < used ? i / R * R + (i % R + s) % R : i)...>(v, v);
}

// f(s, lanes of v turned by s) for 0 <= s < R.
template <int R, class Acc, int s = 0, class F>
inline void each_turn(Vector<Acc> v, F f) {
  f(s, turned<R, s, Acc>(v, LaneIndices<Acc>{}));
  if constexpr (s + 1 < R) each_turn<R, Acc, s + 1>(v, f);
}

// M (R, R) += X^T Y for X, Y (count, R), contiguous.
template <int R, class Acc, class T>
inline void position_covariance(int count, const T* X, const Acc* Y, Acc* M, Ahead& ahead) {
  constexpr int used = lanes<Acc> / R * R;
  constexpr int sets = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // hides the latency of a multiply-add
  Vector<Acc> sums[sets][R] = {};
  auto step = [&](int set, Vector<Acc> x, Vector<Acc> y) {
    each_turn<R, Acc>(y, [&](int s, Vector<Acc> turned) { sums[set][s] += x * turned; });
  };
  const std::int64_t length = std::int64_t(count) * R;
  const bool in_order = is_in_order(ahead);
  Stream stream = take(ahead, R * used, length / used);
  std::int64_t at = 0;
  for (; at + (sets - 1) * used + lanes<Acc> <= length; at += sets * used)
    unrolled<sets>([&](int set) {
      step(set, load_as<Acc>(X + at + set * used), load(Y + at + set * used));
      if (in_order)
        fetch_later(X + at + set * used);
      else
        advance(stream);
    });
  for (; at < length; at += used) {
    const int n = int(length - at < used ? length - at : used);
    step(0, load_partial_as<Acc>(X + at, n), load_partial(Y + at, n));
  }
  for (int s = 0; s < R; ++s) {
    for (int set = 1; set < sets; ++set) sums[0][s] += sums[set][s];
    Acc lane[lanes<Acc>];
    store(lane, sums[0][s]);
    for (int p = 0; p < R; ++p) {
      Acc total = 0;
      for (int g = 0; g < used; g += R) total += lane[g + p];
      M[p * R + (p + s) % R] += total;
    }
  }
}

// V (R, lanes): what each_turn()'s lanes of a position are multiplied by for X W, W (R, R).
template <int R, class Acc>
inline void turn_matrix(const Acc* W, Acc* V) {
  constexpr int used = lanes<Acc> / R * R;
  for (int s = 0; s < R; ++s, V += lanes<Acc>) {
    Acc row[R];
    unrolled<R>([&](int q) { row[q] = W[(q + s) % R * R + q]; });
    for (int g = 0; g < used; g += R) std::memcpy(V + g, row, sizeof row);
    for (int i = used; i < lanes<Acc>; ++i) V[i] = 0;
  }
}

// C (count, R) = sum_i X_i W_i, contiguous, added to C unless `fresh`. X: pointers to (count, R),
// V: `clients` matrices from turn_matrix.
template <int R, class Acc, class T>
inline void position_product(int count, int clients, const T* const* X, const Acc* V, bool fresh,
                             Acc* C, Ahead& ahead) {
  constexpr int used = lanes<Acc> / R * R, block = 8;  // vectors that share a load of V, sums apart
  const std::int64_t length = std::int64_t(count) * R;
  const bool in_order = is_in_order(ahead);
  auto add = [&](auto vectors, std::int64_t at, Vector<Acc>* c, auto load_x) {
    Stream stream = take(ahead, R * used, vectors() * clients);
    for (int i = 0; i < clients; ++i) {
      Vector<Acc> v[R];
      unrolled<R>([&](int s) { v[s] = load(V + (i * R + s) * lanes<Acc>); });
      unrolled<vectors()>([&](int u) {
        each_turn<R, Acc>(load_x(X[i] + at + u * used),
                          [&](int s, Vector<Acc> turned) { c[u] += turned * v[s]; });
        if (in_order)
          fetch_later(X[i] + at + u * used);
        else
          advance(stream);
      });
    }
  };
  std::int64_t at = 0;
  // A store also writes what is behind the lanes used: a zero, or the old sum, which the next
  // vector has to be loaded before.
  Vector<Acc> next = {};
  if (!fresh && lanes<Acc> <= length) next = load(C);
  for (; at + (block - 1) * used + lanes<Acc> <= length; at += block * used) {
    Vector<Acc> c[block] = {next};
    unrolled<block - 1>(
        [&](int u) { c[u + 1] = fresh ? Vector<Acc>{} : load(C + at + (u + 1) * used); });
    add(std::integral_constant<int, block>{}, at, c, [](const T* p) { return load_as<Acc>(p); });
    if (!fresh && at + block * used + lanes<Acc> <= length) next = load(C + at + block * used);
    unrolled<block>([&](int u) { store(C + at + u * used, c[u]); });
  }
  for (; at < length; at += used) {
    const int n = int(length - at < used ? length - at : used);
    Vector<Acc> c[1] = {fresh ? Vector<Acc>{} : load_partial(C + at, n)};
    add(std::integral_constant<int, 1>{}, at, c,
        [=](const T* p) { return load_partial_as<Acc>(p, n); });
    store_partial(C + at, c[0], n);
  }
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
