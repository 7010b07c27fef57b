// Gram blocks of one layer: all directions of all clients and of the reference against each other.
// The factors are brought to panels of positions, in which they lie side by side, and these are
// multiplied with themselves.
#pragma once

#include "panel.h"
#include "product.h"
#include "small_rank.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Directions of a panel: whole vectors, zero beyond the last.
template <class Acc>
int panel_width(int directions) {
  return (directions + lanes<Acc> - 1) / lanes<Acc> * lanes<Acc>;
}

// Positions of a panel: as long a piece of every client's factor as half of a second-level cache
// has room for, since memory is read much faster in long pieces.
template <class Acc>
int panel_length(int width) {
  constexpr int elements = (256 << 10) / sizeof(Acc), shortest = 32, longest = 1024;
  return std::min(longest, std::max(shortest, elements / width / 16 * 16));
}

template <class Acc>
std::size_t gram_scratch(int clients, int r) {
  const int n = panel_width<Acc>((clients + 1) * r), length = panel_length<Acc>(n);
  // Rows of A that share a vector of the panel may belong to two clients more than fit.
  return (std::size_t(n) + lanes<Acc> + 2 * r) * (length + panel_padding);
}

// One factor of a layer, of all clients (0 <= i < clients) and the reference (i == clients).
template <class Acc>
class Factor {
 public:
  Factor(const Problem& problem, int layer, Side side)
      : problem_(problem), layer_(layer), side_(side) {}

  int rank(int i) const { return is_ref(i) ? problem_.shapes[layer_].r : problem_.ranks[at(i)]; }

  // Positions begin <= t < begin + count; widened into `panel` unless they are Acc.
  Block<Acc> positions(int i, std::int64_t begin, int count, Acc* panel) const {
    const Matrix* A = is_ref(i) ? problem_.ref_A : problem_.lora_A;
    const Matrix* B = is_ref(i) ? problem_.ref_B : problem_.lora_B;
    const DType dtype = is_ref(i) ? problem_.ref_dtype : problem_.client_dtype;
    return block(side_, dtype, (side_ == Side::A ? A : B)[at(i)], rank(i), begin, count, panel);
  }

 private:
  bool is_ref(int i) const { return i == problem_.clients; }
  int at(int i) const { return is_ref(i) ? layer_ : i * problem_.layers + layer_; }

  const Problem& problem_;
  const int layer_;
  const Side side_;
};

// to (count, n) <- rows[p][t] for lanes<Acc> rows, n apart; a row that is null is zero.
template <class Acc>
void transpose_rows(const Acc* const* rows, int count, Acc* to, std::int64_t n) {
  constexpr int width = lanes<Acc>;
  int t = 0;
  for (; t + width <= count; t += width) {
    Vector<Acc> v[width];
    for (int p = 0; p < width; ++p) v[p] = rows[p] ? load(rows[p] + t) : Vector<Acc>{};
    transpose<Acc>(v);
    for (int p = 0; p < width; ++p) store(to + (t + p) * n, v[p]);
  }
  for (; t < count; ++t)
    for (int p = 0; p < width; ++p) to[t * n + p] = rows[p] ? rows[p][t] : Acc(0);
}

// panel (count, n) <- positions of A (r_i, k) of all clients and the reference, r directions each.
template <class Acc>
void fill_from_A(const Factor<Acc>& A, int clients, int r, std::int64_t begin, int count, int n,
                 Acc* panel, Acc* scratch) {
  const std::int64_t row = count + panel_padding;
  for (int first = 0; first < n; first += lanes<Acc>) {
    const Acc* rows[lanes<Acc>] = {};
    Acc* widened = scratch;
    // Directions first <= s < first + lanes, a client's at a time.
    for (int s = first; s < std::min(first + lanes<Acc>, (clients + 1) * r);) {
      const int i = s / r, end = std::min(first + lanes<Acc>, (i + 1) * r);
      const Block<Acc> X = A.positions(i, begin, count, widened);
      if (X.data == widened) widened += A.rank(i) * row;
      for (; s < end; ++s)
        if (s - i * r < A.rank(i)) rows[s - first] = X.data + (s - i * r) * X.direction;
    }
    transpose_rows(rows, count, panel + first, n);
  }
}

// The same of B (d, r_i): clients that share a vector of the panel together. Acc may be a type that
// is not computed with, too.
template <class Acc>
void fill_from_B(const Factor<Acc>& B, int clients, int r, std::int64_t begin, int count, int n,
                 Acc* panel, Acc* scratch) {
  constexpr int most = lanes<Acc>;
  const int together = std::max(1, most / r);
  for (int first = 0; first <= clients; first += together) {
    const int group = std::min(together, clients + 1 - first);
    Block<Acc> X[most];
    bool full = true;
    for (int c = 0; c < group; ++c) {
      const int rank = B.rank(first + c);
      X[c] = B.positions(first + c, begin, count,
                         scratch + std::int64_t(c) * r * (count + panel_padding));
      full &= rank == r;
    }
    Acc* to = panel + first * r;
    auto place = [&](auto width) {
      constexpr int hot = 128;  // rows of the panel that all clients of a group find in the cache
      for (int top = 0; top < count; top += hot)
        for (int c = 0; c < group; ++c) {
          const std::int64_t position = X[c].position;
          const Acc* from = X[c].data + top * position;
          Acc* row = to + top * std::int64_t(n) + c * r;
          for (int t = top; t < std::min(top + hot, count); ++t, from += position, row += n)
            for (int p = 0; p < width; ++p) row[p] = from[p];
        }
    };
    if (full && r <= small_rank<Acc>) {
      with_rank<Acc>(r, place);
    } else if (full) {
      place(r);
    } else {
      for (int t = 0; t < count; ++t)
        for (int c = 0; c < group; ++c)
          for (int p = 0; p < r; ++p)
            to[t * std::int64_t(n) + c * r + p] =
                p < B.rank(first + c) ? X[c].data[t * X[c].position + p] : Acc{};
    }
  }
  for (int t = 0; t < count; ++t)
    std::fill(panel + t * std::int64_t(n) + (clients + 1) * r, panel + (t + 1) * std::int64_t(n),
              Acc{});
}

// G (n, n), n = panel_width((clients + 1) r) <- the products of all directions of one factor of a
// layer, on and below the diagonal; blocks of r, zero beyond a rank. Only columns of the first-th
// and every step-th pair of vectors after it: what several threads make together.
template <class Acc>
void gram(const Problem& problem, int layer, Side side, int r, int first, int step, Acc* G,
          Acc* scratch) {
  constexpr int inner =
      96;  // positions at a time: tiles of the panel stay in the first-level cache
  const Layer s = problem.shapes[layer];
  const int n = panel_width<Acc>((problem.clients + 1) * r), length = panel_length<Acc>(n);
  const std::int64_t all = side == Side::A ? s.k : s.d;
  const Factor<Acc> factor(problem, layer, side);
  Acc *panel = scratch, *widened = panel + std::int64_t(n) * length;
  Ahead ahead{};
  for (std::int64_t begin = 0; begin < all; begin += length) {
    const int count = int(std::min<std::int64_t>(length, all - begin));
    if (side == Side::A)
      fill_from_A(factor, problem.clients, r, begin, count, n, panel, widened);
    else
      fill_from_B(factor, problem.clients, r, begin, count, n, panel, widened);
    for (int t = 0; t < count; t += inner)
      product_lower(n, std::min(inner, count - t), panel + std::int64_t(t) * n, first, step, G,
                    ahead);
  }
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
