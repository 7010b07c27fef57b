// Polar factors of a batch, spread over threads.
#include <algorithm>
#include <atomic>

#include "buffer.h"
#include "engine.h"
#include "kernels.h"
#include "threads.h"

namespace fedrot::cpu {
namespace {

template <class Acc>
long polar_batch(const Acc* M, Acc* out, long batch, int m, int n, bool proper, int threads) {
  const Kernels<Acc>& table = kernels<Acc>();
  // Matrices a unit: small ones are worked on in groups, large ones are worth a unit each.
  const int block = n <= 16 ? 64 : n <= 64 ? 8 : 1;
  const std::size_t square = std::size_t(n) * n, given = std::size_t(m) * n;
  const std::size_t scratch_size = table.matrix_scratch_size(n) + block * square;
  const auto scratch = uninitialized<Acc>(scratch_size * threads);
  std::atomic<long> bad{batch};
  const int units = int((batch + block - 1) / block);
  parallel_for(units, threads, [&](int unit, int thread) {
    Acc* X = scratch.get() + scratch_size * thread;
    const long first = long(unit) * block, count = std::min<long>(block, batch - first);
    for (long b = 0; b < count; ++b) {
      std::copy_n(M + (first + b) * given, given, X + b * square);
      std::fill(X + b * square + given, X + (b + 1) * square, Acc(0));
    }
    const int at = table.polars(n, int(count), X, proper, X + block * square);
    if (at >= 0)
      for (long seen = bad; first + at < seen && !bad.compare_exchange_weak(seen, first + at);) {
      }
    for (long b = 0; b < count; ++b) std::copy_n(X + b * square, given, out + (first + b) * given);
  });
  return bad == batch ? -1 : long(bad);
}

}  // namespace

long polar(const void* M, void* out, long batch, int m, int n, bool is_double, bool proper,
           int threads) {
  return is_double ? polar_batch(static_cast<const double*>(M), static_cast<double*>(out), batch, m,
                                 n, proper, threads)
                   : polar_batch(static_cast<const float*>(M), static_cast<float*>(out), batch, m,
                                 n, proper, threads);
}

}  // namespace fedrot::cpu
