// The stages of one call on one thread, as a table with an entry per instruction set.
// cpu/engine.cpp cuts a call into these and spreads them over threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace fedrot::cpu {

enum class Side { A, B };

// Whether covariances read the factors of this side.
inline bool is_aligned(const Problem& p, Side side) {
  return p.lam > 0 && p.align != (side == Side::A ? Align::B : Align::A);
}

// Elements more from one row of a panel of A to the next: a power of two would put all rows into
// few sets of the cache.
constexpr int panel_padding = 16;

// Part of a factor: direction p (of the rank) at position t (along k of A, d of B) is
// data[p * direction + t * position].
template <class Acc>
struct Block {
  const Acc* data;
  std::int64_t direction, position;
};

// The reference of one layer as `covariance` wants it.
template <class Acc>
struct Reference {
  Block<Acc> A, B;
};

// Memory to fetch while something else is computed, see ahead.h.
struct Ahead {
  struct Segment {
    const char* data;
    std::int64_t bytes;
  };
  const Segment *next, *end;
  std::int64_t used;  // bytes of *next that have been asked for
  double bytes_per_multiply_add;
  bool in_order;  // no list: every loop fetches what it reads itself a little later
};

// Acc is float, or double where any tensor of the call is float64.
template <class Acc>
struct Kernels {
  // Whether loops over clients fetch in order in this call, at this rank.
  bool (*fetches_in_order)(const Problem&, int r);
  // Elements of scratch that any stage needs for rank r; r x r matrices alone need the second.
  std::size_t (*scratch_size)(int r);
  std::size_t (*matrix_scratch_size)(int r);
  // Uses panels, reference_size elements, for what cannot be read in place.
  std::size_t (*reference_size)(const Layer&);
  Reference<Acc> (*load_reference)(const Problem&, int layer, Acc* panels, Acc* scratch);
  // M (r, r) of one client and layer, zero rows beyond the client's rank.
  void (*covariance)(const Problem&, int layer, int client, const Reference<Acc>&, Ahead&, Acc* M,
                     Acc* scratch);
  // M (count, r, r) -> R (count, r, r) in place. Returns false where one is not finite (kept).
  bool (*rotations)(int r, int count, Acc* M, double lam, bool proper, Acc* scratch);
  // M (count, n, n), zero rows where a matrix had fewer, -> polar factors in place. Returns the
  // first that is not finite (kept), or -1.
  int (*polars)(int n, int count, Acc* M, bool proper, Acc* scratch);
  // One block of clients' share in positions begin <= t < end of the average, see factors.h.
  bool (*apply)(const Problem&, int layer, Side, std::int64_t begin, std::int64_t end, int first,
                int last, const Acc* W, Ahead&, const Matrix& out, Acc* sums, Acc* scratch);
  // Gram blocks of one factor of a layer, see gram.h: the side of G, elements of scratch, and G
  // (zero before).
  int (*gram_side)(int directions);
  std::size_t (*gram_scratch_size)(int clients, int r);
  void (*gram)(const Problem&, int layer, Side, int r, int first, int step, Acc* G, Acc* scratch);
  // out (size, size) <- G of so many directions. Returns whether every value is finite.
  bool (*mirror)(int size, const Acc* G, Acc* out);
};

template <class Acc>
const Kernels<Acc>& kernels();  // for the machine that this runs on
const char* instruction_set();

}  // namespace fedrot::cpu
