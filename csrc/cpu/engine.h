// The operators on CPU: pointers in, pointers out. Results do not depend on `threads`.
#pragma once

#include "../problem.h"

namespace fedrot::cpu {

// out_A (L) (r, k), out_B (L) (d, r). False where a value met on the way was not finite; the
// outputs are then unusable.
bool align_aggregate(const Problem&, const Matrix* out_A, const Matrix* out_B, int threads);

// out (N * L): rotations (r_i, r), contiguous, in float (double where any tensor is float64).
bool align(const Problem&, void* const* out, int threads);

// out (batch, m, n) <- polar factors of M (batch, m, n), m <= n, both contiguous, float or double
// as `is_double` says. Returns -1, or the index of a matrix that is not finite.
long polar(const void* M, void* out, long batch, int m, int n, bool is_double, bool proper,
           int threads);

}  // namespace fedrot::cpu
