// Fragments of 16-bit factors for mma.m16n8k16, from memory straight to registers. Lane 4 g + t
// reads whole vectors and, where positions are rows of what it needs as columns, has 8 x 8 blocks
// transposed. Sums over ranks or positions do not mind their order, so both operands of a product
// number them in the order that vectors bring: see `rank_in_order`.
#pragma once

#include "group.cuh"
#include "tile.cuh"

namespace fedrot::cuda {

constexpr int fragment = 16;  // ranks or positions of one

// N elements, two a register; zero from `count` on.
template <int N>
__device__ __forceinline__ void load_packed(const std::uint16_t* p, int count, bool aligned,
                                            std::uint32_t (&x)[N / 2]) {
  struct __align__(2 * N) Vector {
    std::uint32_t x[N / 2];
  };
  if (aligned && count >= N) {
    const Vector vector = *reinterpret_cast<const Vector*>(p);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) x[i] = vector.x[i];
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const std::uint32_t low = 2 * i < count ? p[2 * i] : 0;
      x[i] = low | (2 * i + 1 < count ? std::uint32_t(p[2 * i + 1]) << 16 : 0);
    }
  }
}

// Of 16 consecutive numbers the one at place g of the first (half 0) or second eight places. A lane
// that reads the four from 4 t on so holds places 2 t and 2 t + 1 of either half.
__device__ __forceinline__ int rank_in_order(int half, int g) {
  return g / 2 * 4 + half * 2 + g % 2;
}

// As operand of a sum over 32 positions from `position` on: x[half][2 s], x[half][2 s + 1] belong
// to rank `rank` + rank_in_order(half, g) and to the s-th 16 of the positions.
template <class Client>
__device__ __forceinline__ void load_for_positions(const Rows<Client>& rows, Side side,
                                                   Integer position, Integer end, int rank,
                                                   int ranks, std::uint32_t (&x)[2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto* data = reinterpret_cast<const std::uint16_t*>(rows.data);
  if (side == Side::columns_of_A) {
    const bool aligned =
        rows.aligned && rows.stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    const Integer p = position + 8 * t, count = end - p;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = rank + rank_in_order(half, g);
      load_packed<8>(data + row * rows.stride + p,
                     row >= ranks ? 0
                     : count < 8  ? int(count)
                                  : 8,
                     aligned, x[half]);
    }
  } else {
#pragma unroll
    for (int eight = 0; eight < 4; ++eight) {
      const Integer p = position + 8 * eight + g;
      const int column = rank + 4 * t;
      std::uint32_t four[2];
      load_packed<4>(data + p * rows.stride + column, p < end ? clamp_to_four(ranks - column) : 0,
                     rows.aligned, four);
#pragma unroll
      for (int half = 0; half < 2; ++half) x[half][eight] = transpose8x8(four[half]);
    }
  }
}

// Of 16 positions that place g of half `half` holds.
__device__ __forceinline__ int position_in_order(Side side, int half, int g) {
  return side == Side::columns_of_A ? rank_in_order(half, g) : 8 * half + g;
}

// As left operand of a sum over 16 ranks from `rank` on, in the order of rank_in_order; its rows
// are the 16 positions from `position` on, in the order of position_in_order.
template <class Client>
__device__ __forceinline__ void load_for_ranks(const Rows<Client>& rows, Side side,
                                               Integer position, Integer end, int rank, int ranks,
                                               std::uint32_t (&a)[4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto* data = reinterpret_cast<const std::uint16_t*>(rows.data);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the ranks, or of the positions
    const bool of_A = side == Side::columns_of_A;
    const Integer p = position + (of_A ? 4 * t : 8 * half + g);
    const int q = rank + (of_A ? rank_in_order(half, g) : 4 * t);
    const int count =
        of_A ? (q < ranks ? clamp_to_four(end - p) : 0) : (p < end ? clamp_to_four(ranks - q) : 0);
    std::uint32_t four[2];
    load_packed<4>(data + (of_A ? q * rows.stride + p : p * rows.stride + q), count, rows.aligned,
                   four);
    a[of_A ? 2 * half : half] = of_A ? transpose8x8(four[0]) : four[0];
    a[of_A ? 2 * half + 1 : half + 2] = of_A ? transpose8x8(four[1]) : four[1];
  }
}

template <class Client>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  Client a, b;
  narrow(low, a);
  narrow(high, b);
  return a.bits | std::uint32_t(b.bits) << 16;
}

// As right operand: 16 rows of R (rank, r) from `row` on, in the order of rank_in_order, and 8
// columns from `column` on, each element the sum of two 16-bit parts.
template <class Client>
__device__ __forceinline__ void load_rotation(const float* R, int rank, int r, int row, int column,
                                              std::uint32_t (&high)[2], std::uint32_t (&low)[2]) {
  const int g = lane_index() / 4, t = lane_index() % 4, j = column + g;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x[2], rest[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = row + rank_in_order(half, 2 * t + e);
      x[e] = i < rank && j < r ? R[i * r + j] : 0;
      Client part;
      narrow(x[e], part);
      rest[e] = x[e] - widen<float>(part);
    }
    high[half] = pack<Client>(x[0], x[1]);
    low[half] = pack<Client>(rest[0], rest[1]);
  }
}

}  // namespace fedrot::cuda
