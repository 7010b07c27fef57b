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

// What happens to the C that is there: overwritten; the first summand of one long sum, whose bits
// do not depend on where it was interrupted; or added to a sum of its own, which keeps the rounding
// errors of long sums small.
enum class Into { replaced, continued, added };

// P rows and Q vectors of columns of C, `tail` lanes of the last vector. unit: x_row is 1.
template <int P, int Q, bool whole, bool unit, class Acc, class T>
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
  for (int s = 0; s < terms; ++s) {
    const Term<Acc, T>& t = term[s];
    const std::int64_t x_row = unit ? 1 : t.x_row, x_inner = t.x_inner, y_row = t.y_row;
    const int inner = t.inner;
    Stream stream = take(ahead, P * Q * lanes<Acc>, inner);
    // Four rows a pointer: all rows then share three registers of offsets.
    constexpr int pointers = (P + 3) / 4;
    const Acc* X[pointers];
    const T* Y = t.Y + col;
    FEDROT_UNROLL
    for (int a = 0; a < pointers; ++a) X[a] = t.X + (row + 4 * a) * x_row;
    for (int l = 0; l < inner; ++l, Y += y_row) {
      Vector<Acc> y[Q];
      FEDROT_UNROLL
      for (int q = 0; q < Q; ++q) y[q] = load_row(Y, q);
      FEDROT_UNROLL
      for (int p = 0; p < P; ++p) {
        FEDROT_UNROLL
        for (int q = 0; q < Q; ++q) sums[p][q] += X[p / 4][p % 4 * x_row] * y[q];
      }
      FEDROT_UNROLL
      for (int a = 0; a < pointers; ++a) X[a] += x_inner;
      advance(stream);
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

// All rows from `row` on, P at a time, then half as many.
template <int P, int Q, bool whole, bool unit, class Acc, class T>
inline void product_rows(int rows, int terms, const Term<Acc, T>* term, std::int64_t row,
                         std::int64_t col, int tail, Into into, Acc* C, std::int64_t c_row,
                         Ahead& ahead) {
  for (; row + P <= rows; row += P)
    product_tile<P, Q, whole, unit>(terms, term, row, col, tail, into, C, c_row, ahead);
  if constexpr (P > 1)
    if (row < rows)
      product_rows<P / 2, Q, whole, unit>(rows, terms, term, row, col, tail, into, C, c_row, ahead);
}

// Rows of a tile that is two vectors wide, and of one that is a vector wide: enough independent
// sums to hide the latency of a multiply-add, few enough for the registers.
constexpr int wide_rows = vector_bytes == 64 ? 8 : 6, narrow_rows = vector_bytes == 64 ? 16 : 8;

// C (rows, cols; rows c_row apart) <- sum over terms of X Y. Nothing beyond the columns given is
// read or written.
template <bool unit, class Acc, class T>
inline void product(int rows, int cols, int terms, const Term<Acc, T>* term, Into into, Acc* C,
                    std::int64_t c_row, Ahead& ahead) {
  constexpr int width = lanes<Acc>;
  int col = 0;
  for (; col + 2 * width <= cols; col += 2 * width)
    product_rows<wide_rows, 2, true, unit>(rows, terms, term, 0, col, width, into, C, c_row, ahead);
  const int rest = cols - col, tail = rest % width;
  if (rest > width)
    product_rows<wide_rows, 2, false, unit>(rows, terms, term, 0, col, tail, into, C, c_row, ahead);
  else if (rest == width)
    product_rows<narrow_rows, 1, true, unit>(rows, terms, term, 0, col, width, into, C, c_row,
                                             ahead);
  else if (rest > 0)
    product_rows<narrow_rows, 1, false, unit>(rows, terms, term, 0, col, tail, into, C, c_row,
                                              ahead);
}

// C (n, n) += X X^T on and below the diagonal, for X (n, inner) at X[t * n + p] and n a multiple of
// the vector length: every `step`-th pair of vectors of columns from the first-th on.
template <class Acc>
inline void product_lower(int n, int inner, const Acc* X, int first, int step, Acc* C,
                          Ahead& ahead) {
  constexpr int width = lanes<Acc>;
  const Term<Acc> term{X, 1, n, X, n, inner};
  for (int col = 2 * width * first; col < n; col += 2 * width * step)
    if (n - col >= 2 * width)
      product_rows<wide_rows, 2, true, true>(n, 1, &term, col, col, width, Into::added, C, n,
                                             ahead);
    else
      product_rows<narrow_rows, 1, true, true>(n, 1, &term, col, col, width, Into::added, C, n,
                                               ahead);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
