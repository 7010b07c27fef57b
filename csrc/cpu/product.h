// Sums of products of small matrices in register tiles: C (+)= sum_s X_s Y_s.
#pragma once

#include "ahead.h"
#include "convert.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// X (rows, inner) with any strides, Y (inner, cols) with contiguous rows, widened on load.
template <class Acc, class T = Acc>
struct Term {
  const Acc* X;
  std::int64_t x_row, x_inner;
  const T* Y;
  std::int64_t y_row;
  int inner;
};

constexpr int most_terms = 8;

// What happens to the C that is there: overwritten; the first summand of one long sum, whose bits
// do not depend on where it was interrupted; or added to a sum of its own, which keeps the rounding
// errors of long sums small.
enum class Into { replaced, continued, added };

// P rows and Q vectors of columns of C, `tail` lanes of the last vector. unit: x_row is 1, and Y is
// the client where there is one, else X. in_order: how it is fetched ahead.
template <int P, int Q, bool whole, bool unit, bool in_order, class Acc, class T>
inline void product_tile(int terms, const Term<Acc, T>* term, std::int64_t row, std::int64_t col,
                         int tail, Into into, Acc* C, std::int64_t c_row, Ahead& ahead) {
  auto load_row = [=](const auto* p, int q) {
    return whole || q + 1 < Q ? load_as<Acc>(p + q * lanes<Acc>)
                              : load_partial_as<Acc>(p + q * lanes<Acc>, tail);
  };
  C += row * c_row + col;
  Vector<Acc> sums[P][Q] = {};
  if (into == Into::continued) {
    FEDROT_UNROLL
    for (int p = 0; p < P; ++p) {
      FEDROT_UNROLL
      for (int q = 0; q < Q; ++q) sums[p][q] = load_row(C + p * c_row, q);
    }
  }
  // Few rows are a small rank, where so many multiply-adds stand for more than a line of memory.
  constexpr int multiply_adds = P * Q * lanes<Acc>, steps = P <= 4 && multiply_adds >= 128 ? 2 : 1;
  for (int s = 0; s < terms; ++s) {
    const Term<Acc, T>& t = term[s];
    const std::int64_t x_row = unit ? 1 : t.x_row, x_inner = t.x_inner, y_row = t.y_row;
    const int inner = t.inner;
    Stream stream{};
    if (!in_order) stream = take(ahead, multiply_adds / steps, std::int64_t(steps) * inner);
    // Four rows a pointer: all rows then share three registers of offsets.
    constexpr int pointers = (P + 3) / 4;
    const Acc* X[pointers];
    const T* Y = t.Y + col;
    FEDROT_UNROLL
    for (int a = 0; a < pointers; ++a) X[a] = t.X + (row + 4 * a) * x_row;
    for (int l = 0; l < inner; ++l, Y += y_row) {
      if (in_order && !unit && l % lanes<Acc> == 0) {  // a line of every row
        FEDROT_UNROLL
        for (int p = 0; p < P; ++p) fetch_later(X[p / 4] + p % 4 * x_row);
      }
      Vector<Acc> y[Q];
      FEDROT_UNROLL
      for (int q = 0; q < Q; ++q) {
        y[q] = load_row(Y, q);
        if (in_order && unit) fetch_later(Y + q * lanes<Acc>);
      }
      FEDROT_UNROLL
      for (int p = 0; p < P; ++p) {
        FEDROT_UNROLL
        for (int q = 0; q < Q; ++q) sums[p][q] += X[p / 4][p % 4 * x_row] * y[q];
      }
      FEDROT_UNROLL
      for (int a = 0; a < pointers; ++a) X[a] += x_inner;
      if (!in_order) unrolled<steps>([&](int) { advance(stream); });
    }
  }
  FEDROT_UNROLL
  for (int p = 0; p < P; ++p) {
    FEDROT_UNROLL
    for (int q = 0; q < Q; ++q) {
      Acc* to = C + p * c_row + q * lanes<Acc>;
      if (into == Into::added) sums[p][q] += load_row(C + p * c_row, q);
      if (whole || q + 1 < Q)
        store(to, sums[p][q]);
      else
        store_partial<Acc>(to, sums[p][q], tail);
    }
  }
}

// All rows from `row` on of Q vectors of columns, in as few tiles of at most P as there can be, of
// about one size.
template <int P, int Q, bool whole, bool unit, class Acc, class T>
inline void product_rows(int rows, int terms, const Term<Acc, T>* term, std::int64_t row,
                         std::int64_t col, int tail, Into into, Acc* C, std::int64_t c_row,
                         Ahead& ahead) {
  const std::int64_t left = rows - row, tiles = (left + P - 1) / P;
  for (const std::int64_t end = row + (left - tiles * (P - 1)) * P; row < end; row += P) {
    if constexpr (may_be_in_order)
      if (ahead.in_order && (unit ? row : col) == 0) {  // the first to read it
        product_tile<P, Q, whole, unit, true>(terms, term, row, col, tail, into, C, c_row, ahead);
        continue;
      }
    product_tile<P, Q, whole, unit, false>(terms, term, row, col, tail, into, C, c_row, ahead);
  }
  if constexpr (P > 1)
    if (row < rows)
      product_rows<P - 1, Q, whole, unit>(rows, terms, term, row, col, tail, into, C, c_row, ahead);
}

// Rows of a tile that is three, two, or one vectors wide: enough independent sums to hide the
// latency of a multiply-add, few enough for the registers. AVX-512 has 32 and needs no third
// vector. Rows of X that are not side by side are often a power of two apart, and more than eight
// would drive each other out of the first-level cache.
constexpr bool many_registers = vector_bytes == 64;
constexpr int most_rows(int vectors, bool unit) {
  if (vectors == 3) return 4;
  if (vectors == 2) return many_registers ? 8 : 6;
  return many_registers && unit ? 16 : 8;
}

// f(vectors, whether all are whole, first column, lanes of the last one if not) for every tile's
// columns; the first two are known to the compiler.
template <class Acc, class F>
__attribute__((always_inline)) inline void each_columns(int cols, F f) {
  constexpr int width = lanes<Acc>;
  int col = 0;
  if constexpr (!many_registers)
    for (; col + 3 * width <= cols && cols - col != 4 * width; col += 3 * width)
      f(std::integral_constant<int, 3>{}, std::true_type{}, col, 0);
  for (; col + 2 * width <= cols; col += 2 * width)
    f(std::integral_constant<int, 2>{}, std::true_type{}, col, 0);
  const int rest = cols - col, tail = rest % width;
  if (rest > width)
    f(std::integral_constant<int, 2>{}, std::false_type{}, col, tail);
  else if (rest == width)
    f(std::integral_constant<int, 1>{}, std::true_type{}, col, 0);
  else if (rest > 0)
    f(std::integral_constant<int, 1>{}, std::false_type{}, col, tail);
}

template <bool unit, class Acc, class T>
inline void product_tiles(int rows, int cols, int terms, const Term<Acc, T>* term, Into into,
                          Acc* C, std::int64_t c_row, Ahead& ahead) {
  each_columns<Acc>(cols, [&](auto Q, auto whole, int col, int tail) {
    product_rows<most_rows(Q(), unit), Q(), whole(), unit>(rows, terms, term, 0, col, tail, into, C,
                                                           c_row, ahead);
  });
}

// Where more rows read Y, so many vectors of its columns are copied together first: rows of Y are
// often a power of two apart, and so in the same few sets of the cache. With AVX2 longer pieces
// were found to be read faster; with AVX-512 they have not been tried.
constexpr int unpacked_rows = many_registers ? 24 : 12, packed_columns = many_registers ? 2 : 12;

// C (rows, cols; rows c_row apart) <- sum over terms of X Y. Nothing beyond the columns given is
// read or written. packed: room for packed_columns vectors a row of all Y, or null.
template <bool unit, class Acc, class T>
inline void product(int rows, int cols, int terms, const Term<Acc, T>* term, Into into, Acc* C,
                    std::int64_t c_row, Ahead& ahead, Acc* packed = nullptr) {
  if (!packed || rows <= unpacked_rows)
    return product_tiles<unit>(rows, cols, terms, term, into, C, c_row, ahead);
  constexpr int width = packed_columns * lanes<Acc>;
  for (int col = 0; col < cols; col += width) {
    const int count = std::min(width, cols - col);
    Term<Acc> copies[most_terms];
    Acc* to = packed;
    for (int s = 0; s < terms; ++s) {
      const Term<Acc, T>& t = term[s];
      copies[s] = {t.X, t.x_row, t.x_inner, to, width, t.inner};
      const T* Y = t.Y + col;
      for (int l = 0; l < t.inner; ++l, Y += t.y_row, to += width)
        if (count == width)
          unrolled<packed_columns>(
              [&](int q) { store(to + q * lanes<Acc>, load_as<Acc>(Y + q * lanes<Acc>)); });
        else
          widen_row(Y, count, to);
    }
    product_tiles<unit>(rows, count, terms, copies, into, C + col, c_row, ahead);
  }
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
