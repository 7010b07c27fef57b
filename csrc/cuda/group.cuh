// The groups of threads that math/ is given on a GPU (see math/group.h): one warp or one block per
// small matrix. Sums are taken in an order that depends on the group's size alone.
#pragma once

#include "../math/dense.h"
#include "ptx.cuh"

namespace fedrot::cuda {

constexpr unsigned whole_warp = ~0u;
constexpr int warp_threads = 32;

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % warp_threads; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / warp_threads; }

template <class T>
__device__ __forceinline__ T sum_over_warp(T x) {
  for (int bits = warp_threads / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(whole_warp, x, bits);
  return x;
}

// The larger value, and of equal ones the first, with its index.
template <class T>
__device__ __forceinline__ void larger(T& value, int& at, T other, int other_at) {
  if (other > value || (other == value && other_at < at)) value = other, at = other_at;
}

// What Warp and Block share: thread `rank` of `size` takes every size-th element.
struct Strided {
  int rank, size;

  template <class F>
  __device__ __forceinline__ void each(int n, F f) const {
    for (int i = rank; i < n; i += size) f(i);
  }
  template <class F>
  __device__ __forceinline__ void each(int rows, int cols, F f) const {
    for (int e = rank; e < rows * cols; e += size) f(e / cols, e % cols);
  }
};

struct Warp : Strided {
  __device__ Warp() : Strided{lane_index(), warp_threads} {}

  template <class T, class F>
  __device__ __forceinline__ T sum(int n, F f) const {
    T total = 0;
    for (int i = rank; i < n; i += size) total += f(i);
    return sum_over_warp(total);
  }
  template <class F>
  __device__ __forceinline__ int argmax(int begin, int end, F f) const {
    int at = begin;  // also of a thread that has no element of its own
    auto value = f(begin);
    for (int i = begin + rank; i < end; i += size) larger(value, at, f(i), i);
    for (int bits = size / 2; bits > 0; bits /= 2) {
      const auto other = __shfl_xor_sync(whole_warp, value, bits);
      larger(value, at, other, __shfl_xor_sync(whole_warp, at, bits));
    }
    return at;
  }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

struct Block : Strided {
  double* exchange;  // shared, one element a warp and as many again

  __device__ explicit Block(double* exchange)
      : Strided{int(threadIdx.x), int(blockDim.x)}, exchange(exchange) {}

  template <class T, class F>
  __device__ __forceinline__ T sum(int n, F f) const {
    T total = 0;
    for (int i = rank; i < n; i += size) total += f(i);
    total = sum_over_warp(total);
    if (lane_index() == 0) exchange[warp_index()] = double(total);
    sync();
    total = 0;
    for (int w = 0; w < size / warp_threads; ++w) total += T(exchange[w]);
    sync();
    return total;
  }
  template <class F>
  __device__ __forceinline__ int argmax(int begin, int end, F f) const {
    const int warps = size / warp_threads;
    auto value = f(begin);
    int at = begin;
    for (int i = begin + rank; i < end; i += size) larger(value, at, f(i), i);
    for (int bits = warp_threads / 2; bits > 0; bits /= 2) {
      const auto other = __shfl_xor_sync(whole_warp, value, bits);
      larger(value, at, other, __shfl_xor_sync(whole_warp, at, bits));
    }
    if (lane_index() == 0) {
      exchange[warp_index()] = double(value);
      exchange[warps + warp_index()] = double(at);
    }
    sync();
    value = exchange[0];
    at = int(exchange[warps]);
    for (int w = 1; w < warps; ++w)
      larger(value, at, decltype(value)(exchange[w]), int(exchange[warps + w]));
    sync();
    return at;
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// multiply() of math/dense.h: each element at once, since waiting is dear here and C may be far.
template <class T, class G>
__device__ __forceinline__ void multiply_elements(const G& g, int rows, int inner, int cols,
                                                  const T* A, int lda, const T* B, int ldb, T* C,
                                                  int ldc) {
  g.each(rows, cols, [=](int i, int j) {
    T total = 0;
    for (int p = 0; p < inner; ++p) total += A[i * lda + p] * B[p * ldb + j];
    C[i * ldc + j] = total;
  });
  g.sync();
}
template <class T>
__device__ __noinline__ void multiply(const Warp& g, int rows, int inner, int cols, const T* A,
                                      int lda, const T* B, int ldb, T* C, int ldc) {
  multiply_elements(g, rows, inner, cols, A, lda, B, ldb, C, ldc);
}
template <class T>
__device__ __noinline__ void multiply(const Block& g, int rows, int inner, int cols, const T* A,
                                      int lda, const T* B, int ldb, T* C, int ldc) {
  multiply_elements(g, rows, inner, cols, A, lda, B, ldb, C, ldc);
}

}  // namespace fedrot::cuda
