// Average of A of small ranks: one client after the other, up to four rows of the result at a time
// to the end of a chunk. The rank is known to the compiler and the loop over columns is within,
// since a tile has few multiply-adds to pay for a call and for counting.
#pragma once

#include "product.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Rows row <= p < row + P and Q vectors of columns from `col` on, `tail` lanes of the last, of what
// few_rows_product() does. step: for take_steps().
template <int R, int P, int Q, bool whole, class Acc>
inline void few_rows_tile(bool fresh, int row, int col, int tail, const Term<Acc>& term, Acc* C,
                          std::int64_t c_row, std::int64_t step, Ahead& ahead) {
  auto load_row = [=](const Acc* p, int q) {
    return whole || q + 1 < Q ? load(p + q * lanes<Acc>) : load_partial(p + q * lanes<Acc>, tail);
  };
  const Acc *X = term.X + row, *Y = term.Y + col;
  C += row * c_row + col;
  Vector<Acc> sums[P][Q] = {};
  if (!fresh) {
    FEDROT_UNROLL
    for (int p = 0; p < P; ++p) {
      FEDROT_UNROLL
      for (int q = 0; q < Q; ++q) sums[p][q] = load_row(C + p * c_row, q);
    }
  }
  Stream stream = take_steps(ahead, step, R);
  FEDROT_UNROLL
  for (int l = 0; l < R; ++l, Y += term.y_row) {
    Vector<Acc> y[Q];
    FEDROT_UNROLL
    for (int q = 0; q < Q; ++q) y[q] = load_row(Y, q);
    FEDROT_UNROLL
    for (int p = 0; p < P; ++p) {
      FEDROT_UNROLL
      for (int q = 0; q < Q; ++q) sums[p][q] += X[l * R + p] * y[q];
    }
    advance(stream);
  }
  FEDROT_UNROLL
  for (int p = 0; p < P; ++p) {
    FEDROT_UNROLL
    for (int q = 0; q < Q; ++q) {
      Acc* to = C + p * c_row + q * lanes<Acc>;
      if (whole || q + 1 < Q)
        store(to, sums[p][q]);
      else
        store_partial<Acc>(to, sums[p][q], tail);
    }
  }
}

// C (R, count; rows c_row apart) <- term.X^T term.Y, added to C unless `fresh`; X (R, R) is
// contiguous.
template <int R, int row = 0, class Acc>
inline void few_rows_product(bool fresh, int count, const Term<Acc>& term, Acc* C,
                             std::int64_t c_row, Ahead& ahead) {
  constexpr int left = R - row, most = most_rows(3, true), tiles = (left + most - 1) / most;
  constexpr int P = (left + tiles - 1) / tiles;
  const std::int64_t step = step_of(ahead, P * 3 * lanes<Acc>);
  each_columns<Acc>(count, [&](auto Q, auto whole, int col, int tail) {
    few_rows_tile<R, P, Q(), whole()>(fresh, row, col, tail, term, C, c_row, step, ahead);
  });
  if constexpr (row + P < R) few_rows_product<R, row + P>(fresh, count, term, C, c_row, ahead);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
