// Gram blocks (gram.h) of bfloat16 on the matrix unit (tiles.h): no number needs more than one part
// there. Those of float need three, and vectors are as fast.
#pragma once

#include "tiles.h"

#if defined(__AMX_BF16__)
#include "gram.h"
#include "small_rank.h"

namespace fedrot {
inline namespace FEDROT_ISA {

inline bool gram_uses_tiles(const Problem& problem) {
  return problem.client_dtype == DType::bf16 && problem.ref_dtype == DType::bf16;
}

// Positions at a time: the tiles of both sides stay in the second-level cache.
inline int tile_gram_length(int n) {
  constexpr int bytes = 512 << 10, longest = 1024;
  return std::min(longest,
                  std::max(step_positions, bytes / (4 * n) / step_positions * step_positions));
}

// Floats of scratch: the tiles of both sides, and a panel.
inline std::size_t tile_gram_scratch(int clients, int r) {
  const std::size_t n = gram_side<float>((clients + 1) * r);
  return n * tile_gram_length(int(n)) * 3 / 2;
}

// Tiles [step][piece of the directions] <- positions of A, neighbours in a row of a tile.
inline void tiles_from_A(const Factor<BFloat16>& A, int clients, int r, std::int64_t begin,
                         int count, int tiles, char* to) {
  for (int i = 0; i < tiles; ++i)
    for (int p = 0; p < tile_rows; ++p) {
      const int s = i * tile_rows + p, client = s / r, direction = s % r;
      char* row = to + i * tile_bytes + p * tile_row_bytes;
      const BFloat16* from = nullptr;
      if (client <= clients && direction < A.rank(client)) {
        const Block<BFloat16> X = A.positions(client, begin, count, nullptr);
        from = X.data + direction * X.direction;
      }
      for (int t = 0; t < count; t += step_positions, row += tiles * tile_bytes) {
        const int left = count - t;
        const auto inside = left >= step_positions ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        _mm512_storeu_si512(
            row, from ? _mm512_maskz_loadu_epi16(inside, from + t) : _mm512_setzero_si512());
      }
    }
}

// panel (count, n) <- positions of B (d, r_i) of all clients and the reference, r directions each:
// clients that share a vector of the panel together.
inline void fill_from_B(const Factor<BFloat16>& B, int clients, int r, std::int64_t begin,
                        int count, int n, BFloat16* panel) {
  constexpr int most = lanes<BFloat16>;
  const int together = std::max(1, most / r);
  for (int first = 0; first <= clients; first += together) {
    const int group = std::min(together, clients + 1 - first);
    Block<BFloat16> X[most];
    bool full = true;
    for (int c = 0; c < group; ++c) {
      const int rank = B.rank(first + c);
      X[c] = B.positions(first + c, begin, count, nullptr);
      full &= rank == r;
    }
    BFloat16* to = panel + first * r;
    auto place = [&](auto width) {
      constexpr int hot = 128;  // rows of the panel that all clients of a group find in the cache
      for (int top = 0; top < count; top += hot)
        for (int c = 0; c < group; ++c) {
          const std::int64_t position = X[c].position;
          const BFloat16* from = X[c].data + top * position;
          BFloat16* row = to + top * std::int64_t(n) + c * r;
          for (int t = top; t < std::min(top + hot, count); ++t, from += position, row += n)
            for (int p = 0; p < width; ++p) row[p] = from[p];
        }
    };
    if (full && r <= small_rank<BFloat16>) {
      with_rank<BFloat16>(r, place);
    } else if (full) {
      place(r);
    } else {
      for (int t = 0; t < count; ++t)
        for (int c = 0; c < group; ++c)
          for (int p = 0; p < r; ++p)
            to[t * std::int64_t(n) + c * r + p] =
                p < B.rank(first + c) ? X[c].data[t * X[c].position + p] : BFloat16{};
    }
  }
  for (int t = 0; t < count; ++t)
    std::fill(panel + t * std::int64_t(n) + (clients + 1) * r, panel + (t + 1) * std::int64_t(n),
              BFloat16{});
}

// As gram() of floats, but every step-th row of tiles from the first-th on.
inline void tile_gram(const Problem& problem, int layer, Side side, int r, int first, int step,
                      float* G, float* scratch) {
  const Layer s = problem.shapes[layer];
  const int n = gram_side<float>((problem.clients + 1) * r), tiles = n / tile_rows,
            length = tile_gram_length(n);
  const std::int64_t all = side == Side::A ? s.k : s.d, bytes = 2 * std::int64_t(n) * length;
  const Factor<BFloat16> factor(problem, layer, side);
  char *left = reinterpret_cast<char*>(scratch), *right = left + bytes;
  BFloat16* panel = reinterpret_cast<BFloat16*>(right + bytes);
  const Tiles unit(tile_rows, tile_rows, tile_rows, true);
  for (std::int64_t begin = 0; begin < all; begin += length) {
    const int count = int(std::min<std::int64_t>(length, all - begin));
    const int steps = steps_of(count);
    const bool of_A = side == Side::A;
    if (of_A) {
      tiles_from_A(factor, problem.clients, r, begin, count, tiles, left);
    } else {
      fill_from_B(factor, problem.clients, r, begin, count, n, panel);
      for (int t = 0; t < steps; ++t)
        pack_across(panel + std::int64_t(t) * step_positions * n, n, count - t * step_positions, n,
                    tile_rows, 1, right + t * tiles * tile_bytes, tile_bytes);
    }
    flip(steps * tiles, of_A ? left : right, of_A ? right : left);
    for (int i = first; i < tiles; i += step) {
      const Operand held{left + i * tile_bytes, tile_row_bytes, tiles * tile_bytes, 0, 1};
      for (int j = 0; j <= i; j += most_swept) {
        const int swept = std::min(most_swept, i + 1 - j);
        float* to = G + std::int64_t(tile_rows) * (std::int64_t(i) * n + j);
        load_sums(swept, to, tile_rows, n);
        multiply<true>(
            steps, held, swept,
            {right + j * tile_bytes, tile_row_bytes, tiles * tile_bytes, 0, 1, tile_bytes});
        store_sums(swept, to, tile_rows, n);
      }
    }
  }
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
#endif
