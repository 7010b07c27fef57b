// From the cross-covariance M of one client and layer to the rotation that is applied to it:
//   R* = polar(M) with det +1 where `proper`,   R = polar((1 - lam) I + lam R*)
#pragma once

#include "polar.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// M (n, n) -> R (n, n) in place; a client of rank r_i < n has its last rows zero.
// work: workspace_size(n) elements, pivots: n integers.
template <class T, class G>
FEDROT_HD void rotation(const G& g, int n, T* M, T lam, bool proper, T* work, int* pivots) {
  const T eps = epsilon<T>() * n;
  if (!(lam > 0)) return identity(g, n, M);
  polar(g, n, M, proper ? 1 : 0, T(0), eps, work, pivots);
  if (!(lam < 1)) return;
  g.each(n, n, [=](int i, int j) { M[i * n + j] = lam * M[i * n + j] + (i == j) * (1 - lam); });
  g.sync();
  // At lam = 1/2 an eigenvalue -1 of R* leaves a zero as small as R*'s own rounding.
  // A rotation has these in pairs, and stays a rotation.
  polar(g, n, M, proper ? 1 : 0, T(1), 32 * eps, work, pivots);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
