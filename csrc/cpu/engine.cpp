// Cuts a call into units of work and spreads them over threads. Two ways, with the same bits:
//   whole layers   a unit is a layer: as many clients as a core's own cache holds get their
//                  covariances, rotations and their share of the average before the next ones are
//                  read, so that the second read of every factor comes from cache
//   parts          for few layers: first the rotations (unit: layer x block of clients), then the
//                  average (unit: layer x side x range of positions)
#include "engine.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace fedrot::cpu {
namespace {

bool uses_double(const Problem& p) {
  return p.client_dtype == DType::f64 || p.ref_dtype == DType::f64;
}

std::int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

int largest_rank(const Problem& p) {
  int r = 1;
  for (int l = 0; l < p.layers; ++l) r = std::max(r, p.shapes[l].r);
  return r;
}

// Bytes of client factors that a core's second-level cache keeps beside as many of the next block,
// the reference and the result.
std::int64_t cache_bytes() {
  static const std::int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return std::int64_t(size) / 4;
#endif
    return std::int64_t(256) << 10;
  }();
  return bytes;
}

template <class T>
std::unique_ptr<T[]> uninitialized(std::size_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

template <class Acc>
class Engine {
 public:
  Engine(const Problem& problem, int threads)
      : problem_(problem), threads_(threads), arenas_(threads) {
    scratch_ = kernels_.scratch_size(largest_rank(problem));
    for (int l = 0; l < problem.layers; ++l) {
      const Layer s = problem.shapes[l];
      panels_ = std::max<std::size_t>(panels_, s.r * (s.d + s.k));
      matrices_ = std::max(matrices_, cached_clients(l) * square(l));
    }
  }

  bool aggregate(const Matrix* out_A, const Matrix* out_B) {
    // With many layers it hardly matters which thread gets the last one.
    if (threads_ == 1 || problem_.layers >= 4 * threads_)
      whole_layers(out_A, out_B);
    else
      in_parts(out_A, out_B);
    return finite_;
  }

  bool rotations(void* const* out) {
    each_block([&](int layer, int first, int last, Arena& arena) {
      const Acc* R = arena.matrices;
      rotate(layer, first, last, reference(layer, arena), arena.matrices, arena);
      for (int i = first; i < last; ++i, R += square(layer)) {
        const int index = i * problem_.layers + layer;
        const std::size_t count = std::size_t(problem_.ranks[index]) * problem_.shapes[layer].r;
        std::memcpy(out[index], R, count * sizeof(Acc));
      }
    });
    return finite_;
  }

 private:
  // What one thread works in; made when it takes its first unit.
  struct Arena {
    Ahead ahead{};
    std::vector<Ahead::Segment> segments;
    std::unique_ptr<Acc[]> memory;
    Acc *scratch, *panels, *sums, *matrices;
  };

  Arena& arena(int thread) {
    Arena& a = arenas_[thread];
    if (!a.memory) {
      a.memory = uninitialized<Acc>(scratch_ + 2 * panels_ + matrices_);
      a.scratch = a.memory.get();
      a.panels = a.scratch + scratch_;
      a.sums = a.panels + panels_;
      a.matrices = a.sums + panels_;
    }
    return a;
  }

  std::size_t square(int layer) const {
    return std::size_t(problem_.shapes[layer].r) * problem_.shapes[layer].r;
  }

  // How many clients' factors of one layer fit the cache together.
  std::int64_t cached_clients(int layer) const {
    const Layer s = problem_.shapes[layer];
    const std::int64_t bytes = bytes_of(problem_.client_dtype) * s.r * (s.d + s.k);
    return std::clamp<std::int64_t>(cache_bytes() / bytes, 1, problem_.clients);
  }

  Reference<Acc> reference(int layer, Arena& arena) const {
    // lam = 0 leaves every client as it is: no covariance is needed.
    if (!(problem_.lam > 0)) return {};
    return kernels_.load_reference(problem_, layer, arena.panels, arena.scratch);
  }

  // R (last - first, r, r) <- the rotations of these clients.
  void rotate(int layer, int first, int last, const Reference<Acc>& reference, Acc* R,
              Arena& arena) {
    const int r = problem_.shapes[layer].r;
    if (!(problem_.lam > 0)) {
      std::fill(R, R + (last - first) * square(layer), Acc(0));
      for (int i = first; i < last; ++i, R += square(layer))
        for (int p = 0; p < r; ++p) R[p * r + p] = 1;
      return;
    }
    for (int i = first; i < last; ++i)
      kernels_.covariance(problem_, layer, i, reference, arena.ahead,
                          R + (i - first) * square(layer), arena.scratch);
    if (!kernels_.rotations(r, last - first, R, problem_.lam, problem_.proper, arena.scratch))
      finite_ = false;
  }

  // R_i <- w_i R_i
  void weigh(int layer, int first, int last, Acc* R) const {
    for (int i = first; i < last; ++i)
      for (const Acc* end = R + square(layer); R < end; ++R) *R *= Acc(problem_.weights[i]);
  }

  void whole_layers(const Matrix* out_A, const Matrix* out_B) {
    std::atomic<int> taken{0};
    parallel_for(std::min(threads_, problem_.layers), threads_, [&](int, int thread) {
      // The next layer is taken before this one is done: its first clients are fetched meanwhile.
      for (int layer = taken++, next; layer < problem_.layers; layer = next) {
        next = taken++;
        whole_layer(layer, next, out_A[layer], out_B[layer], arena(thread));
      }
    });
  }

  void whole_layer(int layer, int next, const Matrix& out_A, const Matrix& out_B, Arena& arena) {
    const Layer s = problem_.shapes[layer];
    const int block = int(cached_clients(layer));
    const Reference<Acc> reference = this->reference(layer, arena);
    Acc* sums_A = block < problem_.clients ? arena.sums : nullptr;
    Acc* sums_B = sums_A ? sums_A + s.r * s.k : nullptr;
    for (int first = 0; first < problem_.clients; first += block) {
      const int last = std::min(first + block, problem_.clients);
      const double work = 2. * s.r * s.r * (s.d + s.k) * (last - first);
      arena.ahead = {};
      if (last < problem_.clients)
        look_ahead(layer, last, std::min(last + block, problem_.clients), work, arena);
      else if (next < problem_.layers)
        look_ahead(next, 0, int(cached_clients(next)), work, arena);
      rotate(layer, first, last, reference, arena.matrices, arena);
      weigh(layer, first, last, arena.matrices);
      if (!kernels_.apply(problem_, layer, Side::A, 0, s.k, first, last, arena.matrices,
                          arena.ahead, out_A, sums_A, arena.scratch) ||
          !kernels_.apply(problem_, layer, Side::B, 0, s.d, first, last, arena.matrices,
                          arena.ahead, out_B, sums_B, arena.scratch))
        finite_ = false;
    }
  }

  // Spreads the fetching of these clients over `work` multiply-adds.
  void look_ahead(int layer, int first, int last, double work, Arena& arena) const {
    const Layer s = problem_.shapes[layer];
    const std::int64_t size = bytes_of(problem_.client_dtype);
    arena.segments.clear();
    double bytes = 0;
    for (int i = first; i < last; ++i) {
      const int index = i * problem_.layers + layer, rank = problem_.ranks[index];
      const Matrix &A = problem_.lora_A[index], &B = problem_.lora_B[index];
      if (A.row_stride != s.k || B.row_stride != rank) continue;  // there are gaps in between
      arena.segments.push_back({static_cast<const char*>(A.data), size * rank * s.k});
      arena.segments.push_back({static_cast<const char*>(B.data), size * rank * s.d});
      bytes += double(size) * rank * (s.d + s.k);
    }
    constexpr double hurry = 1.2;  // loops whose length is no multiple of their step ask for less
    const Ahead::Segment* segments = arena.segments.data();
    arena.ahead = {segments, segments + arena.segments.size(), 0, hurry * bytes / work};
  }

  // work(layer, first, last, arena) for blocks of clients of every layer.
  template <class F>
  void each_block(F work) {
    std::vector<int> first_unit(problem_.layers + 1, 0);
    auto block = [&](int layer) {  // small enough for every thread to get some
      const std::int64_t share = std::int64_t(problem_.clients) * problem_.layers / (4 * threads_);
      return int(std::clamp<std::int64_t>(share, 1, cached_clients(layer)));
    };
    for (int l = 0; l < problem_.layers; ++l)
      first_unit[l + 1] = first_unit[l] + (problem_.clients + block(l) - 1) / block(l);
    each_part(first_unit, [&](int layer, int part, int thread) {
      const int first = part * block(layer),
                last = std::min(first + block(layer), problem_.clients);
      work(layer, first, last, arena(thread));
    });
  }

  // work(item, part, thread) for the parts of every item: item's units begin at first_unit[item].
  template <class F>
  void each_part(const std::vector<int>& first_unit, F work) {
    parallel_for(first_unit.back(), threads_, [&](int unit, int thread) {
      const auto next = std::upper_bound(first_unit.begin(), first_unit.end(), unit);
      const int item = int(next - first_unit.begin()) - 1;
      work(item, unit - first_unit[item], thread);
    });
  }

  void in_parts(const Matrix* out_A, const Matrix* out_B) {
    constexpr std::int64_t range = 512;  // positions a unit
    std::vector<std::size_t> offset(problem_.layers + 1, 0);
    for (int l = 0; l < problem_.layers; ++l)
      offset[l + 1] = offset[l] + problem_.clients * square(l);
    const auto W = uninitialized<Acc>(offset.back());
    each_block([&](int layer, int first, int last, Arena& arena) {
      Acc* Wi = W.get() + offset[layer] + first * square(layer);
      rotate(layer, first, last, reference(layer, arena), Wi, arena);
      weigh(layer, first, last, Wi);
    });
    std::vector<int> first_unit(2 * problem_.layers + 1, 0);
    for (int item = 0; item < 2 * problem_.layers; ++item) {
      const Layer s = problem_.shapes[item / 2];
      first_unit[item + 1] = first_unit[item] + int(((item % 2 ? s.d : s.k) + range - 1) / range);
    }
    each_part(first_unit, [&](int item, int part, int thread) {
      const int layer = item / 2;
      const Side side = item % 2 ? Side::B : Side::A;
      const Layer s = problem_.shapes[layer];
      const std::int64_t begin = part * range, length = side == Side::A ? s.k : s.d;
      if (!kernels_.apply(problem_, layer, side, begin, std::min(begin + range, length), 0,
                          problem_.clients, W.get() + offset[layer], arena(thread).ahead,
                          (side == Side::A ? out_A : out_B)[layer], nullptr, arena(thread).scratch))
        finite_ = false;
    });
  }

  const Problem& problem_;
  const Kernels<Acc>& kernels_ = kernels<Acc>();
  const int threads_;
  std::vector<Arena> arenas_;
  std::size_t scratch_ = 0, panels_ = 0, matrices_ = 0;  // elements an arena
  std::atomic<bool> finite_{true};
};

template <class Acc>
long polar_batch(const Acc* M, Acc* out, long batch, int m, int n, bool proper, int threads) {
  const Kernels<Acc>& table = kernels<Acc>();
  constexpr int block = 16;  // matrices a unit
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
