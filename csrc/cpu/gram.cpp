// Gram blocks of all layers, spread over threads.
#include <algorithm>
#include <atomic>

#include "buffer.h"
#include "engine.h"
#include "kernels.h"
#include "threads.h"

namespace fedrot::cpu {
namespace {

template <class Acc>
bool gram_of(const Problem& problem, int r, Acc* out_A, Acc* out_B, int threads) {
  const Kernels<Acc>& table = kernels<Acc>();
  const int size = (problem.clients + 1) * r, n = table.gram_side(size);
  const std::size_t square = std::size_t(n) * n;
  // Where there are fewer than some factors a thread, several threads share one: each brings rows
  // together for itself and makes every parts-th row of tiles.
  const int factors = 2 * problem.layers, parts = std::max(1, 4 * threads / factors);
  const std::size_t scratch_size = whole_lines<Acc>(table.gram_scratch_size(problem.clients, r));
  const auto scratch = uninitialized<Acc>(scratch_size * threads);
  const int kept = parts == 1 ? threads : factors;
  const auto G = uninitialized<Acc>(square * kept);
  std::atomic<bool> finite{true};
  auto out = [&](int factor) {
    return (factor % 2 ? out_B : out_A) + std::size_t(factor / 2) * size * size;
  };
  if (parts > 1) std::fill(G.get(), G.get() + square * kept, Acc(0));
  parallel_for(factors * parts, threads, [&](int unit, int thread) {
    const int factor = unit / parts, part = unit % parts;
    Acc* to = G.get() + square * (parts == 1 ? thread : factor);
    if (parts == 1) std::fill(to, to + square, Acc(0));
    table.gram(problem, factor / 2, factor % 2 ? Side::B : Side::A, r, part, parts, to,
               scratch.get() + scratch_size * thread);
    if (parts == 1 && !table.mirror(size, to, out(factor))) finite = false;
  });
  if (parts > 1)
    parallel_for(factors, threads, [&](int factor, int) {
      if (!table.mirror(size, G.get() + square * factor, out(factor))) finite = false;
    });
  return finite;
}

}  // namespace

bool gram(const Problem& p, int r, void* out_A, void* out_B, int threads) {
  return uses_double(p)
             ? gram_of(p, r, static_cast<double*>(out_A), static_cast<double*>(out_B), threads)
             : gram_of(p, r, static_cast<float*>(out_A), static_cast<float*>(out_B), threads);
}

}  // namespace fedrot::cpu
