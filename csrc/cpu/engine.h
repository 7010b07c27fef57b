// The operators on CPU: pointers in, pointers out. Results do not depend on `threads`.
#pragma once

#include "../problem.h"

namespace fedrot::cpu {

// Whether the call is accumulated in double.
inline bool uses_double(const Problem& p) {
  return p.client_dtype == DType::f64 || p.ref_dtype == DType::f64;
}

// out_A (L) (r, k), out_B (L) (d, r). False where a value met on the way was not finite; the
// outputs are then unusable.
bool align_aggregate(const Problem&, const Matrix* out_A, const Matrix* out_B, int threads);

// out (N * L): rotations (r_i, r), contiguous, in float (double where any tensor is float64).
bool align(const Problem&, void* const* out, int threads);

// out_A, out_B (L, S, S), S = (N + 1) r: A A^T and B^T B of the factors of all clients and then the
// reference, one behind the other, each padded to r, the largest rank. False where a value is not
// finite.
bool gram(const Problem&, int r, void* out_A, void* out_B, int threads);

// out_A (L) (r, k) <- sum_i mix_A[l, i]^T A_i, out_B (L) (d, r) <- sum_i B_i mix_B[l, i] with mix
// (L, N, r, r), r the largest rank. False where a value of them is not finite.
bool combine(const Problem&, int r, const void* mix_A, const void* mix_B, const Matrix* out_A,
             const Matrix* out_B, int threads);

// out (batch, m, n) <- polar factors of M (batch, m, n), m <= n, both contiguous, float or double
// as `is_double` says. Returns -1, or the index of a matrix that is not finite.
long polar(const void* M, void* out, long batch, int m, int n, bool is_double, bool proper,
           int threads);

}  // namespace fedrot::cpu
