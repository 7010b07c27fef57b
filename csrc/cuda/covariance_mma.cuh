// Partial cross-covariances of 16-bit factors by the matrix units (see covariance.cuh). Client and
// reference have the same dtype, so that products are exact; sums are float32.
#pragma once

#include "fragments.cuh"

namespace fedrot::cuda {

template <int Height, int Width, class Client>
__device__ __noinline__ void covariance_mma(const Rows<Client>& client, const Rows<Client>& ref,
                                            Side side, Integer begin, Integer end, int row,
                                            int column, int rank, int r, float* partial) {
  constexpr int down = Height / fragment, across = Width / fragment;
  constexpr bool brain = dtype_of<Client> == DType::bf16;
  float sums[down][2 * across][4] = {};
  for (Integer p = begin; p < end; p += 2 * fragment) {
    std::uint32_t x[down][2][4], y[across][2][4];
#pragma unroll
    for (int i = 0; i < down; ++i)
      load_for_positions(client, side, p, end, row + i * fragment, rank, x[i]);
#pragma unroll
    for (int j = 0; j < across; ++j)
      load_for_positions(ref, side, p, end, column + j * fragment, r, y[j]);
#pragma unroll
    for (int s = 0; s < 4; s += 2)
#pragma unroll
      for (int i = 0; i < down; ++i) {
        const std::uint32_t a[4] = {x[i][0][s], x[i][1][s], x[i][0][s + 1], x[i][1][s + 1]};
#pragma unroll
        for (int j = 0; j < 2 * across; ++j) {
          const std::uint32_t b[2] = {y[j / 2][j % 2][s], y[j / 2][j % 2][s + 1]};
          multiply_add<brain>(sums[i][j], a, b);
        }
      }
  }
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < down; ++i)
#pragma unroll
    for (int j = 0; j < 2 * across; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = row + i * fragment + rank_in_order(e / 2, g);
        const int n = column + j / 2 * fragment + rank_in_order(j % 2, 2 * t + e % 2);
        if (m < rank && n < r) partial[m * r + n] = sums[i][j][e];
      }
}

}  // namespace fedrot::cuda
