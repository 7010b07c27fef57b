// The r x r stage of one client and layer: its partial cross-covariances to the rotation that is
// applied. Up to rank 32 a warp does it in registers; what is rare there (a reflection to be
// undone, a deficient M) and larger ranks go through math/rotation.h in a workspace in global
// memory.
#pragma once

#include "../math/rotation.h"
#include "newton.cuh"

namespace fedrot::cuda {

using Integer = std::int64_t;

// M (n, n) = first + (first + step) + ... in this order, rows beyond `rows` zero.
template <class T>
struct Partials {
  const T* first;  // (rows, n)
  Integer step;
  int count, rows, n;

  // Past the first level cache, which does not see what other multiprocessors wrote.
  __device__ __forceinline__ T operator()(int i, int j) const {
    if (i >= rows) return 0;
    T total = 0;
    for (int u = 0; u < count; ++u) total += __ldcg(first + u * step + i * n + j);
    return total;
  }
};

// Workspaces that any group may borrow while it runs.
struct Pool {
  void* memory;  // `slots` of workspace_elements(largest n)
  int* taken;    // (slots), zero while free
  int slots;
  Integer slot_elements;

  // By one thread. There may be fewer slots than groups: whoever holds one waits for nobody.
  __device__ __forceinline__ int take() const {
    int slot = int(blockIdx.x % unsigned(slots));
    while (atomicCAS(taken + slot, 0, 1) != 0) {
      slot = slot + 1 < slots ? slot + 1 : 0;
      __nanosleep(100);
    }
    __threadfence();
    return slot;
  }
  __device__ __forceinline__ void give_back(int slot) const {
    __threadfence();
    atomicExch(taken + slot, 0);
  }
};

// Elements of a workspace: the matrix, what rotation() needs beside it, its pivots.
__host__ __device__ constexpr Integer workspace_elements(Integer n) {
  return (1 + workspace_matrices) * n * n + 2 * n;
}

// What becomes of M: R = weight * rotation, (rows, n) contiguous. A weight of NaN spoils all of it.
template <class T>
struct Wanted {
  T lam;
  bool proper;
  T weight;
  T* R;
};

// By the whole group, through global memory. `slot` is the same for all.
template <class T, class G>
__device__ __noinline__ void rotate_in_workspace(const G& g, Partials<T> M, Wanted<T> wanted,
                                                 T* workspace) {
  const int n = M.n, count = n * n;
  T *X = workspace, *work = X + count;
  int* pivots = reinterpret_cast<int*>(work + workspace_size(n));
  g.each(n, n, [=](int i, int j) { X[i * n + j] = M(i, j); });
  g.sync();
  const bool finite = g.template sum<T>(count, [=](int e) { return X[e] * 0; }) == 0;
  g.sync();
  if (finite) rotation(g, n, X, wanted.lam, wanted.proper, work, pivots);
  const T weight = finite ? wanted.weight : T(NAN);
  g.each(M.rows * n, [=](int e) { wanted.R[e] = weight * X[e]; });
  g.sync();
}

// Rotations that need no more than Newton's iteration. False where more is to be done.
template <int W, class T>
__device__ __forceinline__ bool rotate_rows(T (&x)[W], int n, T lam, bool proper, T* scratch) {
  const int row = lane_index() % W;
  T largest = 0;
  for (int j = 0; j < W; ++j) largest = magnitude(x[j]) > largest ? magnitude(x[j]) : largest;
  if (row >= n) largest = 0;
  for (int bits = W / 2; bits > 0; bits /= 2) {
    const T other = __shfl_xor_sync(whole_warp, largest, bits);
    largest = other > largest ? other : largest;
  }
  if (!(largest > 0)) return false;
  for (int j = 0; j < W; ++j)
    if (row < n) x[j] /= largest;

  // First R* from M, then R from the mixture; thresholds as in rotation().
  const T eps = epsilon<T>() * n;
  for (int stage = 0;; ++stage) {
    const int det = newton_rows(x, n, T(stage), stage ? 32 * eps : eps, scratch);
    if (det == 0 || (proper && det < 0)) return false;
    if (stage == 1 || !(lam < 1)) return true;
    for (int j = 0; j < W; ++j)
      if (row < n) x[j] = lam * x[j] + (row == j) * (1 - lam);
  }
}

// By one warp, n <= W. scratch: newton_scratch(W) elements of its own in shared memory.
template <int W, class T>
__device__ __noinline__ void rotate_by_warp(Partials<T> M, Wanted<T> wanted, T* scratch,
                                            Pool pool) {
  const Warp g;
  const int n = M.n, row = lane_index() % W;
  g.each(W, W,
         [=](int i, int j) { scratch[i * (W + 1) + j] = i < n && j < n ? M(i, j) : T(i == j); });
  g.sync();
  T x[W], poison = 0;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    x[j] = scratch[row * (W + 1) + j];
    poison += x[j] * 0;
  }
  g.sync();
  const bool finite = sum_over_warp(poison) == 0;
  if (finite && wanted.lam > 0 && !rotate_rows(x, n, wanted.lam, wanted.proper, scratch)) {
    int slot = lane_index() == 0 ? pool.take() : 0;
    slot = __shfl_sync(whole_warp, slot, 0);
    __syncwarp();  // a shuffle orders no memory
    rotate_in_workspace(g, M, wanted, static_cast<T*>(pool.memory) + slot * pool.slot_elements);
    if (lane_index() == 0) pool.give_back(slot);
    return;
  }
  if (lane_index() < M.rows) {
#pragma unroll
    for (int j = 0; j < W; ++j)
      if (j < n) {
        const T rotated = wanted.lam > 0 ? x[j] : T(row == j);
        wanted.R[row * n + j] = (finite ? wanted.weight : T(NAN)) * rotated;
      }
  }
}

// By one block, any n. exchange: shared, 64 elements.
template <class T>
__device__ __noinline__ void rotate_by_block(Partials<T> M, Wanted<T> wanted, double* exchange,
                                             Pool pool) {
  const Block g(exchange);
  if (threadIdx.x == 0) exchange[0] = pool.take();
  g.sync();
  const int slot = int(exchange[0]);
  g.sync();
  rotate_in_workspace(g, M, wanted, static_cast<T*>(pool.memory) + slot * pool.slot_elements);
  if (threadIdx.x == 0) pool.give_back(slot);
}

}  // namespace fedrot::cuda
