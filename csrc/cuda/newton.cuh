// math/newton.h for one warp and n <= W <= 32: lane i (and i + W, i + 2 W, ...) holds row i % W of
// the matrix in registers, beyond n that of the identity. The same iteration; pivots are chosen to
// about five digits, which is as good.
#pragma once

#include "../math/polar.h"
#include "group.cuh"

namespace fedrot::cuda {

// Elements of shared memory that newton_rows() needs: rows an odd number of elements apart.
__host__ __device__ constexpr int newton_scratch(int W) { return W * (W + 1); }

__device__ __forceinline__ unsigned leading_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned leading_bits(double x) { return __double2hiint(x); }

// Rows y of X <- rows of E with E X = a permutation: X^-1 with its rows exchanged, column c of y
// being column p_c of E where row p_c was the pivot of column c. Returns the sign of det X, or 0
// where a pivot is zero. place: c for lane p_c, the row of X^-1 that it holds.
template <int W, class T>
__device__ __forceinline__ int invert_rows(T (&y)[W], int& place) {
  const int row = lane_index() % W;
  int sign = 1;
  place = row;
#pragma unroll
  for (int c = 0; c < W; ++c) {
    // The largest |y[c]| of a row not used yet; the last five bits name the row.
    const unsigned size = leading_bits(magnitude(y[c])) & ~31u;
    const unsigned largest = __reduce_max_sync(whole_warp, place < c ? 0u : size | (31 - row));
    const int p = 31 - int(largest & 31);
    const T pivot = __shfl_sync(whole_warp, y[c], p, W);
    if (!(magnitude(pivot) > 0)) return 0;
    const int moved = __shfl_sync(whole_warp, place, p, W);
    if ((moved != c) != (pivot < 0)) sign = -sign;
    const bool is_pivot = row == p;
    if (is_pivot)
      place = c;
    else if (place == c)
      place = moved;

    const T scale = 1 / pivot, factor = is_pivot ? T(-1) : y[c];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const T of_pivot = (j == c ? T(1) : __shfl_sync(whole_warp, y[j], p, W)) * scale;
      y[j] = (is_pivot || j == c ? T(0) : y[j]) - factor * of_pivot;
    }
  }
  return sign;
}

// The largest norm of a column.
template <int W, class T>
__device__ __forceinline__ T largest_column_of_rows(const T (&x)[W], int n, T* scratch) {
  const int row = lane_index() % W;
  if (lane_index() < W)
    for (int j = 0; j < W; ++j) scratch[row * (W + 1) + j] = x[j];
  __syncwarp();
  T square = 0;
  for (int i = 0; i < n; ++i) {
    const T value = row < n ? scratch[i * (W + 1) + row] : T(0);
    square += value * value;
  }
  __syncwarp();
  for (int bits = W / 2; bits > 0; bits /= 2) {
    const T other = __shfl_xor_sync(whole_warp, square, bits);
    square = other > square ? other : square;
  }
  return std::sqrt(square);
}

// Sum over the n rows of a matrix of what each adds.
template <int W, class T>
__device__ __forceinline__ T sum_over_rows(T x, int n) {
  if (lane_index() % W >= n) x = 0;
  for (int bits = W / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(whole_warp, x, bits);
  return x;
}

// newton_polar(): x <- its polar factor. Returns the sign of det, or 0 where x is singular to
// working precision and then spoilt. scratch: newton_scratch(W) elements.
template <int W, class T>
__device__ __forceinline__ int newton_rows(T (&x)[W], int n, T scale, T tolerance, T* scratch) {
  constexpr int max_steps = 40;
  const int row = lane_index() % W;
  if (!(scale > 0)) scale = largest_column_of_rows(x, n, scratch);
  int sign = 0;
  for (int step = 0; step < max_steps; ++step) {
    T y[W];
    for (int j = 0; j < W; ++j) y[j] = x[j];
    int place;
    const int det = invert_rows(y, place);
    if (det == 0) return 0;
    T square_x = 0, square_y = 0;
    for (int j = 0; j < W; ++j) square_x += x[j] * x[j], square_y += y[j] * y[j];
    const T norm_x = std::sqrt(sum_over_rows<W>(square_x, n)),
            norm_y = std::sqrt(sum_over_rows<W>(square_y, n));
    if (step == 0) {
      sign = det;
      if (!(norm_y * scale * tolerance < 1)) return 0;
    }
    // y[c] of lane p_a is element (a, p_c) of the inverse; lane p_c wants its column p_c.
    if (lane_index() < W)
      for (int c = 0; c < W; ++c) scratch[c * (W + 1) + place] = y[c];
    __syncwarp();
    const T gain = std::sqrt(norm_y / norm_x), a = gain / 2, b = 1 / (2 * gain);
    T change = 0;
    for (int j = 0; j < W; ++j) {
      const T next = a * x[j] + b * scratch[place * (W + 1) + j], difference = next - x[j];
      change += difference * difference;
      if (row < n) x[j] = next;
    }
    __syncwarp();
    if (sum_over_rows<W>(change, n) <= epsilon<T>() * n) break;
  }
  return sign;
}

}  // namespace fedrot::cuda
