// The r x r stage on one thread: batches of cross-covariances to rotations, and polar factors.
#pragma once

#include "../math/rotation.h"
#include "simd.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Elements of scratch that rotations() and polars() need, the pivots behind the workspace.
template <class Acc>
std::size_t rotation_scratch(int r) {
  return std::size_t(workspace_size(r) + r);
}

template <class Acc>
inline bool all_finite(int count, const Acc* X) {
  Acc zero = 0;
  for (int e = 0; e < count; ++e) zero += X[e] * 0;
  return zero == 0;
}

template <class Acc>
inline int* pivots_in(int r, Acc* scratch) {
  return reinterpret_cast<int*>(scratch + workspace_size(r));
}

// M (count, r, r) -> R (count, r, r) in place, each matrix whatever its neighbours. Returns false
// where one of them is not finite (it is then kept).
template <class Acc>
bool rotations(int r, int count, Acc* M, double lam, bool proper, Acc* scratch) {
  bool finite = true;
  for (int c = 0; c < count; ++c, M += r * r) {
    if (all_finite(r * r, M))
      rotation(Serial{}, r, M, Acc(lam), proper, scratch, pivots_in(r, scratch));
    else
      finite = false;
  }
  return finite;
}

// M (count, n, n) -> polar factors in place. Returns the first that is not finite (kept), or -1.
template <class Acc>
int polars(int n, int count, Acc* M, bool proper, Acc* scratch) {
  int bad = -1;
  for (int c = 0; c < count; ++c, M += n * n) {
    if (all_finite(n * n, M))
      polar(Serial{}, n, M, proper ? 1 : 0, Acc(0), epsilon<Acc>() * n, scratch,
            pivots_in(n, scratch));
    else if (bad < 0)
      bad = c;
  }
  return bad;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
