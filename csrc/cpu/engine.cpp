// Cuts a call into units of work. Layers go in waves small enough for the cache: first the
// rotations of every client in the wave (unit: layer x block of clients), then the average
// (unit: layer x side x tile), whose reads the first pass has just made.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace fedrot::cpu {
namespace {

constexpr int client_block = 4;                 // clients that share one load of the reference
constexpr std::int64_t wave_bytes = 2ll << 20;  // per thread: a core's own cache

bool uses_double(const Problem& p) {
  return p.client_dtype == DType::f64 || p.ref_dtype == DType::f64;
}

std::int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

int largest_rank(const Problem& p) {
  int r = 1;
  for (int l = 0; l < p.layers; ++l) r = std::max(r, p.shapes[l].r);
  return r;
}

// The end of the wave that begins at layer `begin`.
int wave_end(const Problem& p, int begin, int threads) {
  std::int64_t bytes = 0;
  int end = begin;
  do {
    const Layer s = p.shapes[end];
    bytes += bytes_of(p.client_dtype) * p.clients * s.r * (s.d + s.k);
    ++end;
  } while (end < p.layers && bytes < wave_bytes * threads);
  return end;
}

template <class Acc>
class Engine {
 public:
  Engine(const Problem& problem, int threads)
      : problem_(problem),
        threads_(threads),
        scratch_size_(kernels_.scratch_size(largest_rank(problem))),
        scratch_(scratch_size_ * threads),
        offsets_(problem.layers + 1, 0) {
    for (int l = 0; l < problem.layers; ++l)
      offsets_[l + 1] = offsets_[l] + std::size_t(problem.clients) * square(l);
  }

  bool aggregate(const Matrix* out_A, const Matrix* out_B) {
    for (int begin = 0; begin < problem_.layers;) {
      const int end = wave_end(problem_, begin, threads_);
      rotate(begin, end);
      average(begin, end, out_A, out_B);
      begin = end;
    }
    return finite_;
  }

  bool rotations(void* const* out) {
    for (int begin = 0; begin < problem_.layers;) {
      const int end = wave_end(problem_, begin, threads_);
      rotate(begin, end);
      for (int l = begin; l < end; ++l)
        for (int i = 0; i < problem_.clients; ++i) {
          const int index = i * problem_.layers + l;
          const Acc* R = R_.data() + (offsets_[l] - offsets_[begin]) + i * square(l);
          const std::size_t count = std::size_t(problem_.ranks[index]) * problem_.shapes[l].r;
          std::memcpy(out[index], R, count * sizeof(Acc));
        }
      begin = end;
    }
    return finite_;
  }

 private:
  std::size_t square(int layer) const {
    return std::size_t(problem_.shapes[layer].r) * problem_.shapes[layer].r;
  }
  Acc* scratch(int thread) { return scratch_.data() + scratch_size_ * thread; }

  // R_ <- the rotations of layers begin <= l < end, (N, r, r) a layer.
  void rotate(int begin, int end) {
    R_.resize(offsets_[end] - offsets_[begin]);
    const int blocks = (problem_.clients + client_block - 1) / client_block;
    parallel_for((end - begin) * blocks, threads_, [&](int unit, int thread) {
      const int layer = begin + unit / blocks, r = problem_.shapes[layer].r;
      const int first = unit % blocks * client_block;
      const int last = std::min(first + client_block, problem_.clients);
      Acc* M = R_.data() + (offsets_[layer] - offsets_[begin]) + first * square(layer);
      // lam = 0 leaves every client as it is: no covariance is needed.
      if (problem_.lam > 0) kernels_.covariance(problem_, layer, first, last, M, scratch(thread));
      if (!kernels_.rotations(r, last - first, M, problem_.lam, problem_.proper, scratch(thread)))
        finite_ = false;
    });
  }

  void average(int begin, int end, const Matrix* out_A, const Matrix* out_B) {
    std::vector<int> first_unit(2 * (end - begin) + 1, 0);
    for (int s = 0; s < 2 * (end - begin); ++s) {
      const Layer shape = problem_.shapes[begin + s / 2];
      const std::int64_t tile = kernels_.tile_length(shape.r), n = s % 2 ? shape.d : shape.k;
      first_unit[s + 1] = first_unit[s] + int((n + tile - 1) / tile);
    }
    parallel_for(first_unit.back(), threads_, [&](int unit, int thread) {
      const auto next = std::upper_bound(first_unit.begin(), first_unit.end(), unit);
      const int s = int(next - first_unit.begin()) - 1, side = s % 2, layer = begin + s / 2;
      const Acc* R = R_.data() + (offsets_[layer] - offsets_[begin]);
      const Matrix& out = side == 0 ? out_A[layer] : out_B[layer];
      if (!kernels_.apply(problem_, layer, side, unit - first_unit[s], R, out, scratch(thread)))
        finite_ = false;
    });
  }

  const Problem& problem_;
  const Kernels<Acc>& kernels_ = kernels<Acc>();
  const int threads_;
  const std::size_t scratch_size_;
  std::vector<Acc> scratch_;
  std::vector<std::size_t> offsets_;  // of layer l's rotations, in elements
  std::vector<Acc> R_;                // of the current wave
  std::atomic<bool> finite_{true};
};

template <class Acc>
long polar_batch(const Acc* M, Acc* out, long batch, int m, int n, bool proper, int threads) {
  const Kernels<Acc>& table = kernels<Acc>();
  constexpr int block = 16;  // matrices a unit
  const std::size_t square = std::size_t(n) * n, given = std::size_t(m) * n;
  const std::size_t scratch_size = table.scratch_size(n) + block * square;
  std::vector<Acc> scratch(scratch_size * threads);
  std::atomic<long> bad{batch};
  const int units = int((batch + block - 1) / block);
  parallel_for(units, threads, [&](int unit, int thread) {
    Acc* X = scratch.data() + scratch_size * thread;
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

bool align_aggregate(const Problem& p, const Matrix* out_A, const Matrix* out_B, int threads) {
  return uses_double(p) ? Engine<double>(p, threads).aggregate(out_A, out_B)
                        : Engine<float>(p, threads).aggregate(out_A, out_B);
}

bool align(const Problem& p, void* const* out, int threads) {
  return uses_double(p) ? Engine<double>(p, threads).rotations(out)
                        : Engine<float>(p, threads).rotations(out);
}

long polar(const void* M, void* out, long batch, int m, int n, bool is_double, bool proper,
           int threads) {
  return is_double ? polar_batch(static_cast<const double*>(M), static_cast<double*>(out), batch, m,
                                 n, proper, threads)
                   : polar_batch(static_cast<const float*>(M), static_cast<float*>(out), batch, m,
                                 n, proper, threads);
}

}  // namespace fedrot::cpu
