// Gram blocks of one layer: all directions of all clients and of the reference against each other.
// Every direction is a row of positions, those of A as they lie in memory, and rows are multiplied
// with each other as dot products, a tile of them at a time.
#pragma once

#include "panel.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Rows and columns of a tile, whose sums stay in registers and fill whole vectors when added up.
constexpr int gram_rows = vector_bytes == 64 ? 4 : 2, gram_cols = 4;

// Rows that meet the same columns before the next ones come from the second-level cache. With
// AVX-512 more than a tile's have not been tried.
constexpr int gram_block = vector_bytes == 64 ? gram_rows : 8;

// Side of G: whole tiles, and whole vectors.
template <class Acc>
int gram_side(int directions) {
  constexpr int unit = std::max(lanes<Acc>, gram_cols);
  return (directions + unit - 1) / unit * unit;
}

// Positions at a time: rows of all directions stay in the second-level cache.
template <class Acc>
int gram_length(int side) {
  constexpr int elements = (512 << 10) / sizeof(Acc), shortest = 64, longest = 1024;
  return std::min(longest, std::max(shortest, elements / side / 16 * 16));
}

// Elements of scratch: pointers to the rows, a row of zeros, rows that are not read where they lie,
// and one client before it becomes rows.
template <class Acc>
std::size_t gram_scratch(int clients, int r) {
  const int side = gram_side<Acc>((clients + 1) * r);
  return side * sizeof(void*) / sizeof(Acc) +
         std::size_t(side + r + 1) * (gram_length<Acc>(side) + panel_padding);
}

// One factor of a layer, of all clients (0 <= i < clients) and the reference (i == clients).
template <class Acc>
class Factor {
 public:
  Factor(const Problem& problem, int layer, Side side)
      : problem_(problem), layer_(layer), side_(side) {}

  int rank(int i) const { return is_ref(i) ? problem_.shapes[layer_].r : problem_.ranks[at(i)]; }

  // Positions begin <= t < begin + count; widened into `panel` unless they are Acc.
  Block<Acc> positions(int i, std::int64_t begin, int count, Acc* panel) const {
    return block(side_, dtype(i), matrix(i), rank(i), begin, count, panel);
  }

  // Of B, with r elements a position, zero beyond a rank; in `panel` unless they lie like that.
  const Acc* packed(int i, int r, std::int64_t begin, int count, Acc* panel) const {
    return packed_block(dtype(i), matrix(i), rank(i), r, begin, count, panel);
  }

 private:
  bool is_ref(int i) const { return i == problem_.clients; }
  int at(int i) const { return is_ref(i) ? layer_ : i * problem_.layers + layer_; }
  DType dtype(int i) const { return is_ref(i) ? problem_.ref_dtype : problem_.client_dtype; }
  const Matrix& matrix(int i) const {
    return side_ == Side::A ? (is_ref(i) ? problem_.ref_A : problem_.lora_A)[at(i)]
                            : (is_ref(i) ? problem_.ref_B : problem_.lora_B)[at(i)];
  }

  const Problem& problem_;
  const int layer_;
  const Side side_;
};

// C (gram_rows, gram_cols; rows n apart) += X Y^T for rows X and Y of `count` positions.
template <class Acc>
inline void gram_tile(const Acc* const* X, const Acc* const* Y, int count, Acc* C, int n) {
  constexpr int P = gram_rows, Q = gram_cols, L = lanes<Acc>;
  const Acc *x[P], *y[Q];
  FEDROT_UNROLL
  for (int p = 0; p < P; ++p) x[p] = X[p];
  FEDROT_UNROLL
  for (int q = 0; q < Q; ++q) y[q] = Y[q];
  Vector<Acc> sums[P * Q];
  unrolled<P * Q>([&](int i) { sums[i] = Vector<Acc>{}; });
  auto step = [&](auto load_at) __attribute__((always_inline)) {
    Vector<Acc> right[Q];
    FEDROT_UNROLL
    for (int q = 0; q < Q; ++q) right[q] = load_at(y[q]);
    FEDROT_UNROLL
    for (int p = 0; p < P; ++p) {
      const Vector<Acc> left = load_at(x[p]);
      FEDROT_UNROLL
      for (int q = 0; q < Q; ++q) sums[p * Q + q] += left * right[q];
    }
  };
  int t = 0;
  for (; t + L <= count; t += L) step([=](const Acc* row) { return load(row + t); });
  if (t < count) step([=](const Acc* row) { return load_partial(row + t, count - t); });
  Acc totals[P * Q];
  unrolled<P * Q / L>([&](int g) { store(totals + g * L, lane_sums<Acc>(sums + g * L)); });
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) C[p * std::int64_t(n) + q] += totals[p * Q + q];
}

// to[p * row + t] <- X[t * R + p]. Positions change places within a vector, for all clients alike,
// which dot products do not see.
template <int R, class Acc>
inline void turn_positions(const Acc* X, int count, Acc* to, std::int64_t row) {
  for (int t = 0; t < count; t += lanes<Acc>) {
    Vector<Acc> v[R];
    for (int p = 0; p < R; ++p, X += lanes<Acc>) v[p] = load(X);
    transpose<Acc, R>(v);
    for (int p = 0; p < R; ++p) store(to + p * row + t, v[p]);
  }
}

// f(integral_constant R) where R is r, a power of two up to the length of a vector.
template <class Acc, int R = lanes<Acc>, class F>
inline void with_power_of_two(int r, F f) {
  if (r == R) return f(std::integral_constant<int, R>{});
  if constexpr (R > 1) with_power_of_two<Acc, R / 2>(r, f);
}

// rows[i * r + p] <- direction p of client i (0 <= i < clients) or of the reference (i == clients),
// positions begin <= t < begin + count, in place or in memory; `zeros` beyond a rank.
template <class Acc>
void rows_of_A(const Factor<Acc>& A, int clients, int r, std::int64_t begin, int count,
               const Acc* zeros, const Acc** rows, Acc* memory) {
  for (int i = 0; i <= clients; ++i) {
    const int rank = A.rank(i);
    const Block<Acc> X = A.positions(i, begin, count, memory);
    if (X.data == memory) memory += rank * std::int64_t(count + panel_padding);
    for (int p = 0; p < r; ++p) *rows++ = p < rank ? X.data + p * X.direction : zeros;
  }
}

template <class Acc>
void rows_of_B(const Factor<Acc>& B, int clients, int r, std::int64_t begin, int count,
               const Acc* zeros, const Acc** rows, Acc* memory) {
  const std::int64_t row = count + panel_padding;
  Acc* widened = memory + (clients + 1) * r * row;
  const bool by_groups = r <= lanes<Acc> && (r & (r - 1)) == 0;
  const int turned = by_groups ? count / lanes<Acc> * lanes<Acc> : 0;
  for (int i = 0; i <= clients; ++i, memory += r * row) {
    const int rank = B.rank(i);
    if (turned > 0) {
      const Acc* X = B.packed(i, r, begin, turned, widened);
      with_power_of_two<Acc>(r, [&](auto R) { turn_positions<R>(X, turned, memory, row); });
    }
    const Block<Acc> rest = B.positions(i, begin + turned, count - turned, widened);
    transpose(count - turned, rank, rest.data, rest.position, memory + turned, row);
    for (int p = 0; p < r; ++p) *rows++ = p < rank ? memory + p * row : zeros;
  }
}

// G (side, side), side = gram_side((clients + 1) r) <- the products of all directions of one factor
// of a layer, on and below the diagonal; blocks of r, zero beyond a rank. Only the first-th and
// every step-th block of rows after it: what several threads make together.
template <class Acc>
void gram(const Problem& problem, int layer, Side side, int r, int first, int step, Acc* G,
          Acc* scratch) {
  const Layer s = problem.shapes[layer];
  const int directions = (problem.clients + 1) * r, n = gram_side<Acc>(directions),
            length = gram_length<Acc>(n);
  const std::int64_t all = side == Side::A ? s.k : s.d;
  const Factor<Acc> factor(problem, layer, side);
  const Acc** rows = reinterpret_cast<const Acc**>(scratch);
  Acc* zeros = scratch + n * (sizeof(void*) / sizeof(Acc));
  Acc* memory = zeros + length + panel_padding;
  std::fill(zeros, memory, Acc(0));
  std::fill(rows, rows + n, zeros);
  for (std::int64_t begin = 0; begin < all; begin += length) {
    const int count = int(std::min<std::int64_t>(length, all - begin));
    (side == Side::A ? rows_of_A<Acc> : rows_of_B<Acc>)(factor, problem.clients, r, begin, count,
                                                        zeros, rows, memory);
    for (int top = gram_block * first; top < directions; top += gram_block * step) {
      const int bottom = std::min(top + gram_block, directions);
      for (int j = 0; j < bottom; j += gram_cols)
        for (int i = std::max(top, j); i < bottom; i += gram_rows)
          gram_tile(rows + i, rows + j, count, G + i * std::int64_t(n) + j, n);
    }
  }
}

// out (size, size) <- the symmetric G (side, side) of which the lower triangle is given. Returns
// whether every value is finite.
template <class Acc>
bool mirror(int size, const Acc* G, Acc* out) {
  constexpr int L = lanes<Acc>;
  const std::int64_t n = gram_side<Acc>(size);
  bool finite = true;
  for (int i = 0; i < size; i += L) {
    const int end = std::min(i + L, size);
    for (int p = i; p < end; ++p)
      finite &= finish_row(G + p * n, p + 1, out + std::int64_t(p) * size);
    transpose(end - i, i, G + i * n, n, out + i, size);
    for (int p = i; p < end; ++p)
      for (int q = i; q < p; ++q) out[std::int64_t(q) * size + p] = G[p * n + q];
  }
  return finite;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
