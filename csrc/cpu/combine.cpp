// Averages with given matrices in the place of rotations, spread over threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "buffer.h"
#include "engine.h"
#include "kernels.h"
#include "threads.h"

namespace fedrot::cpu {
namespace {

// Positions begin <= t < end of A or B of a layer.
struct Unit {
  int layer;
  Side side;
  std::int64_t begin, end;
};

// Whether a client has a smaller rank than the layer.
bool smaller(const Problem& problem, int layer) {
  for (int i = 0; i < problem.clients; ++i)
    if (problem.ranks[i * problem.layers + layer] < problem.shapes[layer].r) return true;
  return false;
}

template <class Acc>
bool combined(const Problem& problem, int r, const Acc* mix_A, const Acc* mix_B,
              const Matrix* out_A, const Matrix* out_B, int threads) {
  constexpr std::int64_t length = 1024;
  const Kernels<Acc>& table = kernels<Acc>();
  std::vector<Unit> units;
  std::size_t scratch_size = 0, narrow = 0;
  for (int l = 0; l < problem.layers; ++l) {
    const Layer& s = problem.shapes[l];
    for (const Side side : {Side::A, Side::B}) {
      const std::int64_t all = side == Side::A ? s.k : s.d;
      for (std::int64_t t = 0; t < all; t += length)
        units.push_back({l, side, t, std::min(t + length, all)});
    }
    scratch_size = std::max(scratch_size, whole_lines<Acc>(table.scratch_size(s.r)));
    if (s.r < r || smaller(problem, l))
      narrow = std::max(narrow, whole_lines<Acc>(std::size_t(problem.clients) * s.r * s.r));
  }
  const auto scratch = uninitialized<Acc>((scratch_size + narrow) * threads);
  std::atomic<bool> finite{true};
  parallel_for(int(units.size()), threads, [&](int unit, int thread) {
    const auto& [layer, side, begin, end] = units[unit];
    Acc *own = scratch.get() + (scratch_size + narrow) * thread, *packed = own + scratch_size;
    const std::size_t count = problem.clients, square = std::size_t(r) * r;
    const Acc* W = (side == Side::A ? mix_A : mix_B) + layer * count * square;
    const int rank = problem.shapes[layer].r;
    if (rank < r || smaller(problem, layer)) {
      // Rows beyond a client's rank may hold anything, and small ranks are multiplied with them.
      std::fill_n(packed, count * rank * rank, Acc(0));
      for (std::size_t i = 0; i < count; ++i)
        for (int p = 0; p < problem.ranks[i * problem.layers + layer]; ++p)
          std::copy_n(W + i * square + p * r, rank, packed + (i * rank + p) * rank);
      W = packed;
    }
    Ahead ahead{};
    ahead.in_order = table.fetches_in_order(problem, rank);
    const Matrix& out = (side == Side::A ? out_A : out_B)[layer];
    if (!table.apply(problem, layer, side, begin, end, 0, problem.clients, W, ahead, out, nullptr,
                     own))
      finite = false;
  });
  return finite;
}

}  // namespace

bool combine(const Problem& p, int r, const void* mix_A, const void* mix_B, const Matrix* out_A,
             const Matrix* out_B, int threads) {
  return uses_double(p) ? combined(p, r, static_cast<const double*>(mix_A),
                                   static_cast<const double*>(mix_B), out_A, out_B, threads)
                        : combined(p, r, static_cast<const float*>(mix_A),
                                   static_cast<const float*>(mix_B), out_A, out_B, threads);
}

}  // namespace fedrot::cpu
