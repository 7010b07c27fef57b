// Blocks of a factor in the type that it is computed with or loaded from. A (r, k) is cut along k,
// B (d, r) along d; the words for both are `direction` (of the rank) and `position` (along the
// cut).
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

// Positions begin <= t < begin + count: in place where the tensor holds T, else widened into panel
// (rank * (count + panel_padding)).
template <class T>
inline Block<T> block(Side side, DType dtype, const Matrix& m, int rank, std::int64_t begin,
                      int count, T* panel) {
  const std::int64_t stride = m.row_stride;
  if (is<T>(dtype)) {
    const T* data = static_cast<const T*>(m.data);
    return side == Side::A ? Block<T>{data + begin, stride, 1}
                           : Block<T>{data + begin * stride, 1, stride};
  }
  if constexpr (std::is_floating_point_v<T>)
    with_dtype(dtype, [&](auto* type) {
      using From = std::remove_pointer_t<decltype(type)>;
      const From* data = static_cast<const From*>(m.data);
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
  return side == Side::A ? Block<T>{panel, count + panel_padding, 1} : Block<T>{panel, 1, rank};
}

// The same of B with exactly `width` >= rank elements a position, zero beyond the rank: in place
// where it lies like that, else in panel (count * width).
template <class T>
inline const T* packed_block(DType dtype, const Matrix& m, int rank, int width, std::int64_t begin,
                             int count, T* panel) {
  if (rank == width && m.row_stride == width)
    return block(Side::B, dtype, m, rank, begin, count, panel).data;
  T* panel_row = panel;
  with_dtype(dtype, [&](auto* type) {
    using From = std::remove_pointer_t<decltype(type)>;
    const From* data = static_cast<const From*>(m.data) + begin * m.row_stride;
    for (int t = 0; t < count; ++t, data += m.row_stride, panel_row += width) {
      if constexpr (std::is_same_v<From, T>)
        std::copy_n(data, rank, panel_row);
      else if constexpr (std::is_floating_point_v<T>)
        for (int p = 0; p < rank; ++p) panel_row[p] = T(widen(data[p]));
      std::fill(panel_row + rank, panel_row + width, T{});
    }
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
      const int height = std::min(n, rows - i), width = std::min(n, cols - j);
      const bool whole = height == n && width == n;
      Vector<Acc> v[n];
      for (int p = 0; p < n; ++p) {
        const Acc* row = from + (i + p) * from_row + j;
        v[p] = whole ? load(row) : p < height ? load_partial(row, width) : Vector<Acc>{};
      }
      transpose<Acc>(v);
      for (int p = 0; p < width; ++p) {
        Acc* row = to + (j + p) * to_row + i;
        if (whole)
          store(row, v[p]);
        else
          store_partial<Acc>(row, v[p], height);
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
