// The stages of one call on one thread, as a table with an entry per instruction set.
// cpu/engine.cpp cuts a call into these and spreads them over threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace fedrot::cpu {

// Acc is float, or double where any tensor of the call is float64.
template <class Acc>
struct Kernels {
  // Elements of scratch that any stage needs for rank r.
  std::size_t (*scratch_size)(int r);
  // M[c] (r, r), zero rows beyond the client's rank, for clients begin <= i < end of one layer.
  void (*covariance)(const Problem&, int layer, int begin, int end, Acc* M, Acc* scratch);
  // M (count, r, r) -> R (count, r, r) in place. Returns false where one is not finite (kept).
  bool (*rotations)(int r, int count, Acc* M, double lam, bool proper, Acc* scratch);
  // M (count, n, n), zero rows where a matrix had fewer, -> polar factors in place. Returns the
  // first that is not finite (kept), or -1.
  int (*polars)(int n, int count, Acc* M, bool proper, Acc* scratch);
  // Positions tile * tile_length(r) of A (side 0) or B (side 1): sum_i w_i R_i^T A_i into the
  // output. R: (N, r, r). Returns false where a value is not finite.
  bool (*apply)(const Problem&, int layer, int side, std::int64_t tile, const Acc* R,
                const Matrix& out, Acc* scratch);
  int (*tile_length)(int r);
};

template <class Acc>
const Kernels<Acc>& kernels();  // for the machine that this runs on
const char* instruction_set();

}  // namespace fedrot::cpu
