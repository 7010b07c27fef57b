// The two passes over the factors: cross-covariance and weighted, rotated average, over panels
// (panel.h) with register tiles.
#pragma once

#include <algorithm>
#include <type_traits>

#include "panel.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Long enough to amortise the horizontal sums at the end of each dot product, short enough that two
// panels stay in the second-level cache. A multiple of every vector length.
inline int tile_length(int r) { return r <= 128 ? 512 : 256; }

// Elements of scratch that covariance() and apply() need.
template <class Acc>
std::size_t panel_scratch(int r) {
  // A position-major reference panel has its rows padded to whole vectors.
  return std::size_t(r + padded<Acc>(r)) * tile_length(r) + std::size_t(r) * r;
}

// M[p][q] += sum_t X[p][t] Y[q][t] for a tile of P x Q entries; M has row stride ldm.
template <int P, int Q, class Acc>
inline void dot_tile(int count, const Acc* X, const Acc* Y, int ld, Acc* M, int ldm) {
  Vector<Acc> sums[P][Q] = {};
  for (int t = 0; t < count; t += lanes<Acc>) {
    Vector<Acc> y[Q];
    for (int q = 0; q < Q; ++q) y[q] = load(Y + q * ld + t);
    for (int p = 0; p < P; ++p) {
      const Vector<Acc> x = load(X + p * ld + t);
      for (int q = 0; q < Q; ++q) sums[p][q] += x * y[q];
    }
  }
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) M[p * ldm + q] += horizontal_sum<Acc>(sums[p][q]);
}

template <class Acc>
inline void dot_panels(int rows, int cols, int count, const Acc* X, const Acc* Y, int ld, Acc* M,
                       int ldm) {
  constexpr int Q = vector_bytes == 64 ? 4 : 2;  // accumulators fill half to all of the registers
  int p = 0;
  for (; p + 4 <= rows; p += 4) {
    int q = 0;
    for (; q + Q <= cols; q += Q)
      dot_tile<4, Q>(count, X + p * ld, Y + q * ld, ld, M + p * ldm + q, ldm);
    for (; q < cols; ++q) dot_tile<4, 1>(count, X + p * ld, Y + q * ld, ld, M + p * ldm + q, ldm);
  }
  for (; p < rows; ++p) {
    int q = 0;
    for (; q + Q <= cols; q += Q)
      dot_tile<1, Q>(count, X + p * ld, Y + q * ld, ld, M + p * ldm + q, ldm);
    for (; q < cols; ++q) dot_tile<1, 1>(count, X + p * ld, Y + q * ld, ld, M + p * ldm + q, ldm);
  }
}

// M[p][q] += sum_t X[p][t] Y[t][q] for P rows and up to Q vectors of columns, cols of which are
// real; Y is position-major with row stride ldy.
template <int P, int Q, class Acc>
inline void outer_tile(int cols, int count, const Acc* X, int ld, const Acc* Y, int ldy, Acc* M,
                       int ldm) {
  Vector<Acc> sums[P][Q] = {};
  for (int t = 0; t < count; ++t) {
    Vector<Acc> y[Q];
    for (int q = 0; q < Q; ++q) y[q] = load(Y + t * ldy + q * lanes<Acc>);
    for (int p = 0; p < P; ++p)
      for (int q = 0; q < Q; ++q) sums[p][q] += X[p * ld + t] * y[q];
  }
  for (int p = 0; p < P; ++p) {
    Acc row[Q * lanes<Acc>];
    std::memcpy(row, sums[p], sizeof row);
    for (int q = 0; q < cols; ++q) M[p * ldm + q] += row[q];
  }
}

template <class Acc>
inline void outer_panels(int rows, int cols, int count, const Acc* X, int ld, const Acc* Y, int ldy,
                         Acc* M, int ldm) {
  constexpr int P = vector_bytes == 64 ? 8 : 4, width = 2 * lanes<Acc>;
  for (int q = 0; q < cols; q += width) {
    const int real = std::min(width, cols - q);
    int p = 0;
    if (real > lanes<Acc>) {
      for (; p + P <= rows; p += P)
        outer_tile<P, 2>(real, count, X + p * ld, ld, Y + q, ldy, M + p * ldm + q, ldm);
      for (; p < rows; ++p)
        outer_tile<1, 2>(real, count, X + p * ld, ld, Y + q, ldy, M + p * ldm + q, ldm);
    } else {
      for (; p + P <= rows; p += P)
        outer_tile<P, 1>(real, count, X + p * ld, ld, Y + q, ldy, M + p * ldm + q, ldm);
      for (; p < rows; ++p)
        outer_tile<1, 1>(real, count, X + p * ld, ld, Y + q, ldy, M + p * ldm + q, ldm);
    }
  }
}

template <class Acc>
void covariance(const Problem& problem, int layer, int begin, int end, Acc* M, Acc* scratch) {
  const Layer shape = problem.shapes[layer];
  const int r = shape.r, ld = tile_length(r), ldy = padded<Acc>(r);
  const bool outer = r >= lanes<Acc>;
  Acc *X = scratch, *Y = scratch + r * ld;
  std::fill(M, M + std::size_t(end - begin) * r * r, Acc(0));
  for (const Side side : {Side::A, Side::B}) {
    if (problem.align == (side == Side::A ? Align::B : Align::A)) continue;
    const std::int64_t length = side == Side::A ? shape.k : shape.d;
    const Matrix& reference = (side == Side::A ? problem.ref_A : problem.ref_B)[layer];
    const Matrix* clients = side == Side::A ? problem.lora_A : problem.lora_B;
    for (std::int64_t at = 0; at < length; at += ld) {
      const int count = int(std::min<std::int64_t>(ld, length - at));
      if (outer)
        load_positions(side, problem.ref_dtype, reference, r, at, count, Y, ldy);
      else
        load_panel(side, problem.ref_dtype, reference, r, at, count, Y, ld);
      for (int i = begin; i < end; ++i) {
        const int index = i * problem.layers + layer, rank = problem.ranks[index];
        load_panel(side, problem.client_dtype, clients[index], rank, at, count, X, ld);
        Acc* Mi = M + std::size_t(i - begin) * r * r;
        if (outer)
          outer_panels(rank, r, count, X, ld, Y, ldy, Mi, r);
        else
          dot_panels(rank, r, count, X, Y, ld, Mi, r);
      }
    }
  }
}

// sums[q][t] += sum_p R[p][q] X[p][t] for Q rows of sums; R has row stride ldr.
template <int Q, class Acc>
inline void rotate_tile(int rank, int count, const Acc* R, int ldr, const Acc* X, int ld,
                        Acc* sums) {
  for (int t = 0; t < count; t += lanes<Acc>) {
    Vector<Acc> s[Q];
    for (int q = 0; q < Q; ++q) s[q] = load(sums + q * ld + t);
    for (int p = 0; p < rank; ++p) {
      const Vector<Acc> x = load(X + p * ld + t);
      for (int q = 0; q < Q; ++q) s[q] += R[p * ldr + q] * x;
    }
    for (int q = 0; q < Q; ++q) store(sums + q * ld + t, s[q]);
  }
}

template <class Acc>
bool apply(const Problem& problem, int layer, int side_index, std::int64_t tile, const Acc* R,
           const Matrix& out, Acc* scratch) {
  const Side side = side_index == 0 ? Side::A : Side::B;
  const Layer shape = problem.shapes[layer];
  const int r = shape.r, ld = tile_length(r);
  const std::int64_t at = tile * ld, length = side == Side::A ? shape.k : shape.d;
  const int count = int(std::min<std::int64_t>(ld, length - at));
  const Matrix* clients = side == Side::A ? problem.lora_A : problem.lora_B;
  Acc *X = scratch, *sums = scratch + r * ld, *weighted = sums + r * ld;
  std::fill(sums, sums + std::size_t(r) * ld, Acc(0));
  for (int i = 0; i < problem.clients; ++i) {
    const int index = i * problem.layers + layer, rank = problem.ranks[index];
    load_panel(side, problem.client_dtype, clients[index], rank, at, count, X, ld);
    const Acc w = Acc(problem.weights[i]);
    const Acc* rotation = R + std::size_t(i) * r * r;
    for (int e = 0; e < rank * r; ++e) weighted[e] = w * rotation[e];
    int q = 0;
    for (; q + 4 <= r; q += 4) rotate_tile<4>(rank, count, weighted + q, r, X, ld, sums + q * ld);
    for (; q < r; ++q) rotate_tile<1>(rank, count, weighted + q, r, X, ld, sums + q * ld);
  }
  return store_panel(side, problem.ref_dtype, out, r, at, count, sums, ld);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
