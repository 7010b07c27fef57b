// Partial cross-covariances by plain multiply-adds: over the positions p of one unit
//   M (rank, r) = sum_p client(p, :)^T reference(p, :)
// One warp does up to Height x Width elements of M: lanes are tiles of at most 8 x 4 of them, times
// lanes that share the positions among themselves and add up at the end.
#pragma once

#include "group.cuh"
#include "tile.cuh"

namespace fedrot::cuda {

// sums[e] <- over the 2 * Bits lanes that differ in the bits below: each lane keeps a part of the
// Count elements (all of one where lanes outnumber them). Returns the first that is kept.
template <int Count, int Bits, int N, class Acc>
__device__ __forceinline__ int fold(Acc (&sums)[N], int first = 0) {
  if constexpr (Bits == 0) {
    return first;
  } else if constexpr (Count == 1) {
    sums[0] += __shfl_xor_sync(whole_warp, sums[0], Bits);
    return fold<1, Bits / 2>(sums, first);
  } else {
    constexpr int half = Count / 2;
    const bool upper = lane_index() & Bits;
#pragma unroll
    for (int e = 0; e < half; ++e) {
      const Acc kept = upper ? sums[e + half] : sums[e], sent = upper ? sums[e] : sums[e + half];
      sums[e] = kept + __shfl_xor_sync(whole_warp, sent, Bits);
    }
    return fold<half, Bits / 2>(sums, upper ? first + half : first);
  }
}

// partial (r, r): rows row .. row + Height and columns column .. column + Width of M, those that
// exist (rank, r).
template <int Height, int Width, class Client, class Acc>
__device__ __noinline__ void covariance(const Rows<Client>& client, const Rows<void>& ref,
                                        Side side, Integer begin, Integer end, int row, int column,
                                        int rank, int r, Acc* partial) {
  constexpr int tall = Height < 8 ? Height : 8, wide = 4;
  constexpr int down = Height / tall, across = Width / wide;
  constexpr int position_lanes = warp_threads / (down * across), span = 4 * position_lanes;
  const int lane = lane_index(), at = lane % position_lanes, tile = lane / position_lanes;
  const bool full = client.aligned && ref.aligned && row + Height <= rank && column + Width <= r;
  const Integer first = side == Side::columns_of_A ? 4 * at : at;
  const int my_row = row + tile / across * tall, my_column = column + tile % across * wide;

  Acc sums[tall * wide];
#pragma unroll
  for (int e = 0; e < tall * wide; ++e) sums[e] = 0;
  for (Integer p = begin; p < end; p += span) {
    Acc x[tall][4], y[wide][4];
    if (full && p + span <= end) {
      load_tile<true>(client, side, p + first, position_lanes, end, my_row, rank, x);
      load_tile<true>(ref, side, p + first, position_lanes, end, my_column, r, y);
    } else {
      load_tile<false>(client, side, p + first, position_lanes, end, my_row, rank, x);
      load_tile<false>(ref, side, p + first, position_lanes, end, my_column, r, y);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v)
#pragma unroll
      for (int i = 0; i < tall; ++i)
#pragma unroll
        for (int j = 0; j < wide; ++j) sums[i * wide + j] += x[i][v] * y[j][v];
  }

  constexpr int count = tall * wide;
  constexpr int kept = count > position_lanes ? count / position_lanes : 1;
  const int begin_kept = fold<count, position_lanes / 2>(sums);
  if (at % (position_lanes > count ? position_lanes / count : 1) != 0) return;
#pragma unroll
  for (int e = 0; e < kept; ++e) {
    const int i = my_row + (begin_kept + e) / wide, j = my_column + (begin_kept + e) % wide;
    if (i < rank && j < r) partial[i * r + j] = sums[e];
  }
}

}  // namespace fedrot::cuda
