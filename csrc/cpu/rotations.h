// The r x r stage on one thread: batches of cross-covariances to rotations, and polar factors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math/rotation.h"
#include "lanes.h"
#include "simd_group.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Ranks up to this go one matrix a lane, which takes a few matrices to pay. Nothing but the rank
// may decide: a matrix must come out the same in any batch. The compiler knows the usual ones.
constexpr int largest_lane_rank = 12, largest_known_rank = 8;

template <class Acc>
inline Acc* align_up(Acc* p) {
  const std::size_t beyond = reinterpret_cast<std::uintptr_t>(p) % vector_bytes;
  return beyond ? p + (vector_bytes - beyond) / sizeof(Acc) : p;
}

// Elements of scratch that rotations() and polars() need: pivots behind the workspace, or vectors.
template <class Acc>
std::size_t rotation_scratch(int r) {
  std::size_t size = workspace_size(r) + r + lanes<Acc> + Simd<Acc>::scratch(r);
  if (r <= largest_lane_rank)
    size = std::max(size, Lanes<Acc, 0>::scratch(r) * lanes<Acc> + lanes<Acc>);
  return size;
}

template <class Acc>
inline bool all_finite(int count, const Acc* X) {
  return Simd<Acc>(nullptr).template sum<Acc>(count, [=](int e) { return X[e] * 0; }) == 0;
}

template <class Acc>
inline int* pivots_in(int r, Acc* scratch) {
  return reinterpret_cast<int*>(scratch + workspace_size(r));
}

// M (n, n) -> R (n, n) in place, alone.
template <class Acc>
inline void rotate_one(int n, Acc* M, Acc lam, bool proper, Acc* scratch) {
  rotation(Simd<Acc>(align_up(scratch + workspace_size(n) + n)), n, M, lam, proper, scratch,
           pivots_in(n, scratch));
}

// M (count, n, n) -> R in place for count <= lanes<Acc>. Returns the first that is not finite
// (kept), or -1.
template <int order, class Acc>
int rotate_lanes(int n, int count, Acc* M, Acc lam, bool proper, Acc* scratch) {
  const Acc eps = epsilon<Acc>() * n;
  Lanes<Acc, order> batch(n, reinterpret_cast<Vector<Acc>*>(align_up(scratch)));
  batch.gather(count, M);
  const Mask<Acc> finite = batch.finite();
  Mask<Acc> done = batch.polar(finite & batch.normalize(), proper, Acc(0), eps);
  if (lam < 1) {
    batch.soften(lam);
    done = batch.polar(done, proper, Acc(1), 32 * eps);  // as in rotation()
  }
  int bad = -1;
  batch.scatter(count, M, done);
  for (int c = 0; c < count; ++c) {
    if (done[c]) continue;
    if (finite[c])
      rotate_one<Acc>(n, M + c * n * n, lam, proper, scratch);
    else if (bad < 0)
      bad = c;
  }
  return bad;
}

// M (count, n, n) -> R in place, each matrix whatever its neighbours. Returns the first that is not
// finite (kept), or -1.
template <class Acc>
int rotate_batch(int n, int count, Acc* M, Acc lam, bool proper, Acc* scratch) {
  int bad = -1;
  const int step = n <= largest_lane_rank ? lanes<Acc> : 1;
  for (int c = 0; c < count; c += step, M += step * n * n) {
    int at = -1;
    if (n <= largest_lane_rank) {
      at = with_order<largest_known_rank>(n, [&](auto order) {
        return rotate_lanes<order>(n, std::min(step, count - c), M, lam, proper, scratch);
      });
    } else if (all_finite(n * n, M)) {
      rotate_one(n, M, lam, proper, scratch);
    } else {
      at = 0;
    }
    if (at >= 0 && bad < 0) bad = c + at;
  }
  return bad;
}

// M (count, r, r) -> R (count, r, r) in place. Returns false where one of them is not finite (it
// is then kept).
template <class Acc>
bool rotations(int r, int count, Acc* M, double lam, bool proper, Acc* scratch) {
  if (lam > 0) return rotate_batch(r, count, M, Acc(lam), proper, scratch) < 0;
  for (int c = 0; c < count; ++c) identity(Serial{}, r, M + std::size_t(c) * r * r);
  return true;
}

// M (count, n, n) -> polar factors in place. Returns the first that is not finite (kept), or -1.
template <class Acc>
int polars(int n, int count, Acc* M, bool proper, Acc* scratch) {
  return rotate_batch(n, count, M, Acc(1), proper, scratch);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
