// A thread's share of a factor: some ranks at four positions, in registers. Positions are columns
// of A and rows of B; of A a thread takes four consecutive ones, of B four that are `step` apart,
// so that a warp reads memory in order either way.
#pragma once

#include "../device.h"
#include "elements.cuh"

namespace fedrot::cuda {

using device::Side;

__device__ __forceinline__ int clamp_to_four(Integer count) {
  return count < 0 ? 0 : count < 4 ? int(count) : 4;
}

// x[q][v] = rank `rank` + q at the v-th position from `position` on; zero from `ranks` and `end`
// on. Full: no zero is needed and the rows are aligned.
template <bool Full, int T, class Element, class Acc>
__device__ __forceinline__ void load_tile(const Rows<Element>& rows, Side side, Integer position,
                                          Integer step, Integer end, int rank, int ranks,
                                          Acc (&x)[T][4]) {
  rows.template with_element_type<Acc>([&](auto zero) {
    const auto* data = reinterpret_cast<const decltype(zero)*>(rows.data);
    const bool aligned = Full || rows.aligned;
    if (side == Side::columns_of_A) {
#pragma unroll
      for (int q = 0; q < T; ++q) {
        const int count = Full ? 4 : rank + q < ranks ? clamp_to_four(end - position) : 0;
        load(data + (rank + q) * rows.stride + position, count, aligned, x[q]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const Integer p = position + v * step;
#pragma unroll
        for (int q = 0; q < T; q += 4) {
          const int count = Full ? 4 : p < end ? clamp_to_four(ranks - rank - q) : 0;
          Acc four[4];
          load(data + p * rows.stride + rank + q, count, aligned, four);
#pragma unroll
          for (int e = 0; e < 4; ++e) x[q + e][v] = four[e];
        }
      }
    }
  });
}

// The reverse; what lies beyond `ranks` and `end` is not written.
template <int T, class Element, class Acc>
__device__ __forceinline__ void store_tile(const Rows<Element>& rows, Side side, Integer position,
                                           Integer step, Integer end, int rank, int ranks,
                                           const Acc (&x)[T][4]) {
  rows.template with_element_type<Acc>([&](auto zero) {
    auto* data = reinterpret_cast<decltype(zero)*>(rows.data);
    if (side == Side::columns_of_A) {
#pragma unroll
      for (int q = 0; q < T; ++q) {
        const int count = rank + q < ranks ? clamp_to_four(end - position) : 0;
        store(data + (rank + q) * rows.stride + position, count, rows.aligned, x[q]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const Integer p = position + v * step;
#pragma unroll
        for (int q = 0; q < T; q += 4) {
          const Acc four[4] = {x[q][v], x[q + 1][v], x[q + 2][v], x[q + 3][v]};
          store(data + p * rows.stride + rank + q, p < end ? clamp_to_four(ranks - rank - q) : 0,
                rows.aligned, four);
        }
      }
    }
  });
}

}  // namespace fedrot::cuda
