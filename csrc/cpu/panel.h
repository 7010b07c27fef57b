// Blocks of a factor in the accumulator type. A (r, k) is cut along k, B (d, r) along d; the words
// for both are `direction` (of the rank) and `position` (along the cut).
#pragma once

#include <algorithm>

#include "convert.h"
#include "kernels.h"
#include "shuffle.h"

namespace fedrot {
inline namespace FEDROT_ISA {

using cpu::Block;
using cpu::panel_padding;
using cpu::Side;

// Positions begin <= t < begin + count: in place where the tensor has the accumulator's type,
// else widened into panel (rank * (count + panel_padding)).
template <class Acc>
inline Block<Acc> block(Side side, DType dtype, const Matrix& m, int rank, std::int64_t begin,
                        int count, Acc* panel) {
  const std::int64_t stride = m.row_stride;
  if (is<Acc>(dtype)) {
    const Acc* data = static_cast<const Acc*>(m.data);
    return side == Side::A ? Block<Acc>{data + begin, stride, 1}
                           : Block<Acc>{data + begin * stride, 1, stride};
  }
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(m.data);
    if (side == Side::A)
      for (int p = 0; p < rank; ++p)
        widen_row(data + p * stride + begin, count,
                  panel + std::int64_t(p) * (count + panel_padding));
    else if (stride == rank)
      widen_row(data + begin * stride, std::int64_t(count) * rank, panel);
    else
      for (int t = 0; t < count; ++t)
        widen_row(data + (begin + t) * stride, rank, panel + std::int64_t(t) * rank);
  });
  return side == Side::A ? Block<Acc>{panel, count + panel_padding, 1} : Block<Acc>{panel, 1, rank};
}

// The same of B with exactly `width` >= rank elements a position, zero beyond the rank: in place
// where it lies like that, else in panel (count * width).
template <class Acc>
inline const Acc* packed_block(DType dtype, const Matrix& m, int rank, int width,
                               std::int64_t begin, int count, Acc* panel) {
  if (rank == width && m.row_stride == width)
    return block(Side::B, dtype, m, rank, begin, count, panel).data;
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(m.data) + begin * m.row_stride;
    for (int t = 0; t < count; ++t)
      for (int p = 0; p < width; ++p)
        panel[std::int64_t(t) * width + p] =
            p < rank ? Acc(widen(data[t * m.row_stride + p])) : Acc(0);
  });
  return panel;
}

// to (cols, rows) <- from (rows, cols)^T
template <class Acc>
inline void transpose(int rows, int cols, const Acc* from, std::int64_t from_row, Acc* to,
                      std::int64_t to_row) {
  constexpr int n = lanes<Acc>;
  for (int i = 0; i < rows; i += n)
    for (int j = 0; j < cols; j += n) {
      if (i + n <= rows && j + n <= cols) {
        Vector<Acc> v[n];
        for (int p = 0; p < n; ++p) v[p] = load(from + (i + p) * from_row + j);
        transpose<Acc>(v);
        for (int p = 0; p < n; ++p) store(to + (j + p) * to_row + i, v[p]);
      } else {
        for (int p = i; p < std::min(i + n, rows); ++p)
          for (int q = j; q < std::min(j + n, cols); ++q)
            to[q * to_row + p] = from[p * from_row + q];
      }
    }
}

// Rounds a row to the output's type, or leaves it where it is that already. Returns whether every
// value is finite there: a finite sum may still overflow a narrower type.
template <class Acc, class T>
inline bool finish_row(const Acc* from, int n, T* to) {
  if (static_cast<const void*>(from) != static_cast<const void*>(to)) narrow_row(from, n, to);
  int bad = 0;  // an integer: a sum of floats would have to keep its order, one by one
  for (int i = 0; i < n; ++i) bad |= !is_finite(to[i]);
  return bad == 0;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
