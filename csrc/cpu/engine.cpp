// Spreads the units of work of a call (units.h) over threads. Two ways, with the same bits:
//   whole layers   a unit is a layer. Where a core's own cache holds several clients, each block of
//                  them gets covariances, rotations and its share of the average before the next
//                  one is read, so that the second read comes from that cache; else all clients
//                  are read twice. What comes next is fetched meanwhile, or where lines are fetched
//                  in order, sides that are read once stay out of the blocks (ahead.h).
//   parts          for few layers: first the rotations (unit: layer x block of clients), then the
//                  average (unit: layer x side x range of positions)
#include "engine.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "threads.h"
#include "units.h"

namespace fedrot::cpu {
namespace {

std::int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Bytes of client factors that a core's second-level cache keeps beside the next ones.
std::int64_t cache_bytes() {
  static const std::int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return std::int64_t(size) / 2;
#endif
    return std::int64_t(256) << 10;
  }();
  return bytes;
}

template <class Acc>
class Engine {
 public:
  Engine(const Problem& problem, int threads)
      : problem_(problem), threads_(threads), arenas_(threads) {
    for (int l = 0; l < problem.layers; ++l) {
      const Layer s = problem.shapes[l];
      // Not the largest rank's alone: chunks of other ranks may be longer.
      scratch_ = std::max(scratch_, whole_lines<Acc>(kernels_.scratch_size(s.r)));
      panels_ = std::max(panels_, whole_lines<Acc>(kernels_.reference_size(s)));
      sums_ = std::max(sums_, whole_lines<Acc>(s.r * (s.d + s.k + panel_padding)));
    }
  }

  bool aggregate(const Matrix* out_A, const Matrix* out_B) {
    if (layers_balance(problem_, threads_))
      whole_layers(out_A, out_B);
    else
      in_parts(out_A, out_B);
    return finite_;
  }

  bool rotations(void* const* out) {
    rotate_blocks(
        [&](const Clients& b, Arena& arena) { return matrices(b.layer, b.last - b.first, arena); },
        [&](const Clients& b, const Acc* R) {
          for (int i = b.first; i < b.last; ++i, R += square(b.layer)) {
            const int index = i * problem_.layers + b.layer;
            const std::size_t count =
                std::size_t(problem_.ranks[index]) * problem_.shapes[b.layer].r;
            std::memcpy(out[index], R, count * sizeof(Acc));
          }
        });
    return finite_;
  }

 private:
  // What one thread works in; made when it takes its first unit.
  struct Arena {
    Buffer<Acc> memory, matrices;
    Acc *scratch, *panels, *sums;
    std::size_t matrices_size = 0;
    std::vector<Ahead::Segment> segments;
    Ahead ahead{};
  };

  Arena& arena(int thread) {
    Arena& a = arenas_[thread];
    if (!a.memory) {
      a.memory = uninitialized<Acc>(scratch_ + panels_ + sums_);
      a.scratch = a.memory.get();
      a.panels = a.scratch + scratch_;
      a.sums = a.panels + panels_;
    }
    return a;
  }

  // Room for (clients, r, r).
  Acc* matrices(int layer, int clients, Arena& arena) const {
    const std::size_t size = clients * square(layer);
    if (arena.matrices_size < size) {
      arena.matrices = uninitialized<Acc>(size);
      arena.matrices_size = size;
    }
    return arena.matrices.get();
  }

  std::size_t square(int layer) const {
    return std::size_t(problem_.shapes[layer].r) * problem_.shapes[layer].r;
  }

  bool in_order(int layer) const {
    return kernels_.fetches_in_order(problem_, problem_.shapes[layer].r);
  }

  // Positions that the covariance of one client sums over.
  std::int64_t covariance_length(const Layer& s) const {
    return (is_aligned(problem_, Side::A) ? s.k : 0) + (is_aligned(problem_, Side::B) ? s.d : 0);
  }

  // Whether this side is averaged block by block of clients, if there are blocks.
  bool is_in_blocks(int layer, Side side) const {
    return !in_order(layer) || is_aligned(problem_, side);
  }

  // Clients a block: those of one layer that the cache holds together, or 0 where it is not worth
  // while. Every block but the first reads the sums of those before it and writes them again.
  int cached_clients(int layer) const {
    const Layer s = problem_.shapes[layer];
    const int fewest = in_order(layer) ? 2 : 4;
    const std::int64_t positions =
        (is_in_blocks(layer, Side::A) ? s.k : 0) + (is_in_blocks(layer, Side::B) ? s.d : 0);
    if (positions == 0) return 0;
    const std::int64_t cached = cache_bytes() / (bytes_of(problem_.client_dtype) * s.r * positions);
    if (cached < std::min(fewest, problem_.clients)) return 0;
    // Of about one size: a few clients left over are little work to fetch the next layer behind.
    const std::int64_t blocks = std::max<std::int64_t>(1, (problem_.clients + cached - 1) / cached);
    return int((problem_.clients + blocks - 1) / blocks);
  }

  Reference<Acc> reference(int layer, Arena& arena) const {
    // lam = 0 leaves every client as it is: no covariance is needed.
    if (!(problem_.lam > 0)) return {};
    return kernels_.load_reference(problem_, layer, arena.panels, arena.scratch);
  }

  void covariance(int layer, int client, const Reference<Acc>& reference, Acc* M, Arena& arena) {
    if (problem_.lam > 0)
      kernels_.covariance(problem_, layer, client, reference, arena.ahead, M, arena.scratch);
  }

  // `fetch_next()` adds to the list what comes after the last client.
  template <class F>
  void covariances(int layer, int first, int last, Acc* M, Arena& arena, F fetch_next) {
    const Reference<Acc> reference = this->reference(layer, arena);
    for (int i = first; i < last; ++i, M += square(layer)) {
      const Layer s = problem_.shapes[layer];
      look_ahead(layer, double(s.r) * s.r * covariance_length(s), arena, [&] {
        if (i + 1 < last)
          fetch(layer, i + 1, i + 2, problem_.align, arena);
        else
          fetch_next();
      });
      covariance(layer, i, reference, M, arena);
    }
  }

  // M (count, r, r) -> R
  void rotate(int layer, int count, Acc* M, Arena& arena) {
    if (!kernels_.rotations(problem_.shapes[layer].r, count, M, problem_.lam, problem_.proper,
                            arena.scratch))
      finite_ = false;
  }

  // R_i <- w_i R_i
  void weigh(int layer, int first, int last, Acc* R) const {
    for (int i = first; i < last; ++i)
      for (const Acc* end = R + square(layer); R < end; ++R) *R *= Acc(problem_.weights[i]);
  }

  void average(int layer, const Range& range, int first, int last, const Acc* W, const Matrix& out,
               Acc* sums, Arena& arena) {
    if (!kernels_.apply(problem_, layer, range.side, range.begin, range.end, first, last, W,
                        arena.ahead, out, sums, arena.scratch))
      finite_ = false;
  }

  void whole_layers(const Matrix* out_A, const Matrix* out_B) {
    each_unit(problem_.layers, [&](int layer, int next, Arena& arena) {
      whole_layer(layer, next, out_A[layer], out_B[layer], arena);
    });
  }

  // work(unit, next, arena). The next one of a thread is taken before this one is done: what it
  // reads first is fetched meanwhile. There is none where `next` is not below `units`.
  template <class F>
  void each_unit(int units, F work) {
    const int first = std::min(threads_, units);
    std::atomic<int> taken{first};
    parallel_for(first, threads_, [&](int unit, int thread) {
      for (int next; unit < units; unit = next) {
        next = taken++;
        work(unit, next, arena(thread));
      }
    });
  }

  void whole_layer(int layer, int next, const Matrix& out_A, const Matrix& out_B, Arena& arena) {
    const int block = cached_clients(layer);
    const std::vector<Range> ranges = ranges_left(layer, block);
    const int kept = block > 0 && ranges.empty() ? block : problem_.clients;
    Acc* W = matrices(layer, kept, arena);
    auto fetch_rest = [&](std::size_t from) {
      if (from < ranges.size())
        fetch(layer, ranges[from], arena);
      else
        fetch_layer(next, arena);
    };
    if (block > 0) {
      in_blocks(layer, block, kept, W, out_A, out_B, arena, [&] { fetch_rest(0); });
    } else {
      covariances(layer, 0, problem_.clients, W, arena, [&] { fetch_rest(0); });
      rotate(layer, problem_.clients, W, arena);
      weigh(layer, 0, problem_.clients, W);
    }
    for (std::size_t j = 0; j < ranges.size(); ++j)
      average_all(layer, ranges[j], W, ranges[j].side == Side::A ? out_A : out_B, arena,
                  [&] { fetch_rest(j + 1); });
  }

  // W (kept, r, r): all clients, or each block in the place of the last. `fetch_next()` as for
  // covariances.
  template <class F>
  void in_blocks(int layer, int block, int kept, Acc* W, const Matrix& out_A, const Matrix& out_B,
                 Arena& arena, F fetch_next) {
    const Layer s = problem_.shapes[layer];
    const Reference<Acc> reference = this->reference(layer, arena);
    Acc* sums_A = block < problem_.clients ? arena.sums : nullptr;
    Acc* sums_B = sums_A ? sums_A + s.r * (s.k + panel_padding) : nullptr;
    for (int first = 0; first < problem_.clients; first += block) {
      const int last = std::min(first + block, problem_.clients);
      const double multiply_adds =
          double(last - first) * s.r * s.r * (covariance_length(s) + s.d + s.k);
      look_ahead(layer, multiply_adds, arena, [&] {
        if (last < problem_.clients)
          fetch(layer, last, std::min(last + block, problem_.clients), Align::joint, arena);
        else
          fetch_next();
      });
      Acc* R = W + first % kept * square(layer);
      for (int i = first; i < last; ++i)
        covariance(layer, i, reference, R + (i - first) * square(layer), arena);
      rotate(layer, last - first, R, arena);
      weigh(layer, first, last, R);
      if (is_in_blocks(layer, Side::A))
        average(layer, {Side::A, 0, s.k}, first, last, R, out_A, sums_A, arena);
      if (is_in_blocks(layer, Side::B))
        average(layer, {Side::B, 0, s.d}, first, last, R, out_B, sums_B, arena);
    }
  }

  // What blocks of clients leave of the average of a layer.
  std::vector<Range> ranges_left(int layer, int block) const {
    std::vector<Range> ranges;
    for (const Range& range : ranges_of(problem_.shapes[layer]))
      if (block == 0 || !is_in_blocks(layer, range.side)) ranges.push_back(range);
    return ranges;
  }

  // A range of all clients; `fetch_next()` as for covariances.
  template <class F>
  void average_all(int layer, const Range& range, const Acc* W, const Matrix& out, Arena& arena,
                   F fetch_next) {
    const int r = problem_.shapes[layer].r;
    look_ahead(layer, double(problem_.clients) * r * r * (range.end - range.begin), arena,
               fetch_next);
    average(layer, range, 0, problem_.clients, W, out, nullptr, arena);
  }

  // fetch: adds what comes next to the list, of whole clients the factors that `align` reads.
  // Factors with gaps between their rows are left out.
  void fetch(int layer, int first, int last, Align align, Arena& arena) const {
    const Layer s = problem_.shapes[layer];
    const std::int64_t size = bytes_of(problem_.client_dtype);
    for (int i = first; i < last; ++i) {
      const int index = i * problem_.layers + layer, rank = problem_.ranks[index];
      const Matrix &A = problem_.lora_A[index], &B = problem_.lora_B[index];
      if (align != Align::B && A.row_stride == s.k)
        arena.segments.push_back({static_cast<const char*>(A.data), size * rank * s.k});
      if (align != Align::A && B.row_stride == rank)
        arena.segments.push_back({static_cast<const char*>(B.data), size * rank * s.d});
    }
  }
  void fetch(int layer, const Range& range, Arena& arena) const {
    const std::int64_t size = bytes_of(problem_.client_dtype), count = range.end - range.begin;
    for (int i = 0; i < problem_.clients; ++i) {
      const int index = i * problem_.layers + layer, rank = problem_.ranks[index];
      const Matrix& m = (range.side == Side::A ? problem_.lora_A : problem_.lora_B)[index];
      const char* data = static_cast<const char*>(m.data);
      if (range.side == Side::A)
        for (int p = 0; p < rank; ++p)
          arena.segments.push_back({data + size * (p * m.row_stride + range.begin), size * count});
      else if (m.row_stride == rank)
        arena.segments.push_back({data + size * range.begin * rank, size * count * rank});
    }
  }
  void fetch_layer(int layer, Arena& arena) const {
    if (layer >= problem_.layers) return;
    const int cached = cached_clients(layer);
    if (cached > 0)
      fetch(layer, 0, cached, in_order(layer) ? problem_.align : Align::joint, arena);
    else
      fetch(layer, 0, 1, problem_.align, arena);
  }

  // Spreads the fetching of what `list()` adds over work on this layer that does so many
  // multiply-adds; in order nothing is listed.
  template <class F>
  void look_ahead(int layer, double multiply_adds, Arena& arena, F list) const {
    arena.segments.clear();
    if (!in_order(layer)) list();
    double bytes = 0;
    for (const Ahead::Segment& segment : arena.segments) bytes += double(segment.bytes);
    const Ahead::Segment* segments = arena.segments.data();
    arena.ahead = {segments, segments + arena.segments.size(), 0,
                   multiply_adds > 0 ? bytes / multiply_adds : 0, in_order(layer)};
  }

  // The rotations of every block, into `place(block, arena)`; then `done(block, R)`.
  template <class Place, class Done>
  void rotate_blocks(Place place, Done done) {
    const std::vector<Clients> blocks = blocks_of(problem_, threads_);
    each_unit(int(blocks.size()), [&](int unit, int next, Arena& arena) {
      const Clients& block = blocks[unit];
      Acc* R = place(block, arena);
      covariances(block.layer, block.first, block.last, R, arena, [&] {
        if (next >= int(blocks.size())) return;
        const Clients& b = blocks[next];
        fetch(b.layer, b.first, b.first + 1, problem_.align, arena);
      });
      rotate(block.layer, block.last - block.first, R, arena);
      done(block, R);
    });
  }

  void in_parts(const Matrix* out_A, const Matrix* out_B) {
    std::vector<std::size_t> offset(problem_.layers + 1, 0);
    for (int l = 0; l < problem_.layers; ++l)
      offset[l + 1] = offset[l] + problem_.clients * square(l);
    const auto W = uninitialized<Acc>(offset.back());
    rotate_blocks([&](const Clients& b,
                      Arena&) { return W.get() + offset[b.layer] + b.first * square(b.layer); },
                  [&](const Clients& b, Acc* R) { weigh(b.layer, b.first, b.last, R); });
    std::vector<std::pair<int, Range>> units;
    for (int l = 0; l < problem_.layers; ++l)
      for (const Range& range : ranges_of(problem_.shapes[l])) units.emplace_back(l, range);
    each_unit(int(units.size()), [&](int unit, int next, Arena& arena) {
      const auto& [layer, range] = units[unit];
      average_all(layer, range, W.get() + offset[layer],
                  (range.side == Side::A ? out_A : out_B)[layer], arena, [&] {
                    if (next < int(units.size()))
                      fetch(units[next].first, units[next].second, arena);
                  });
    });
  }

  const Problem& problem_;
  const Kernels<Acc>& kernels_ = kernels<Acc>();
  const int threads_;
  std::vector<Arena> arenas_;
  std::size_t scratch_ = 0, panels_ = 0, sums_ = 0;  // elements an arena
  std::atomic<bool> finite_{true};
};

}  // namespace

bool align_aggregate(const Problem& p, const Matrix* out_A, const Matrix* out_B, int threads) {
  return uses_double(p) ? Engine<double>(p, threads).aggregate(out_A, out_B)
                        : Engine<float>(p, threads).aggregate(out_A, out_B);
}

bool align(const Problem& p, void* const* out, int threads) {
  return uses_double(p) ? Engine<double>(p, threads).rotations(out)
                        : Engine<float>(p, threads).rotations(out);
}

}  // namespace fedrot::cpu
