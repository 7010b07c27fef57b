// The two passes over the factors of factors.h on the matrix unit (tiles.h). Sums over positions or
// directions run along the pairs of tiles, so that factors are read as they lie in memory: bfloat16
// straight into tiles where their size fits, else a row, or two rows in turns.
#pragma once

#include "tiles.h"

#if defined(__AMX_BF16__)
#include "factors.h"

namespace fedrot {
inline namespace FEDROT_ISA {

constexpr int tile_chunk = 512;  // positions at a time

inline bool uses_tiles(const Problem& problem, int r) {
  // Below, vectors are as fast: tiles are mostly empty, or parts take too long to make. Those of
  // float always do.
  return (problem.client_dtype == DType::bf16 && r >= 9) ||
         (problem.client_dtype == DType::f16 && r >= 17);
}

// f(null pointer of the type of the clients' factors), of those that uses_tiles() takes.
template <class F>
inline void with_tile_type(const Problem& problem, F f) {
  problem.client_dtype == DType::bf16 ? f(static_cast<BFloat16*>(nullptr))
                                      : f(static_cast<Float16*>(nullptr));
}

template <class T>
inline const T* at(const Matrix& m, std::int64_t row, std::int64_t column) {
  return static_cast<const T*>(m.data) + row * m.row_stride + column;
}

// Floats of a reference: every tile of every step, of both factors.
inline std::size_t tile_reference_size(const Layer& s) {
  return std::size_t(steps_of(s.k) + steps_of(s.d)) * Cut(s.r, tile_rows).pieces * most_parts *
         tile_bytes / sizeof(float);
}

// As load_reference() in factors.h: tiles [step][piece of the directions][part].
inline cpu::Reference<float> load_tile_reference(const Problem& problem, int layer, float* panels) {
  const Layer s = problem.shapes[layer];
  const Cut directions(s.r, tile_rows);
  const int parts = parts_of(problem.ref_dtype);
  char* to = reinterpret_cast<char*>(panels);
  cpu::Reference<float> reference{};
  auto pack = [&](std::int64_t positions, auto one) {
    const Block<float> packed{reinterpret_cast<float*>(to), 0, 0};
    for (std::int64_t t = 0; t < positions; t += step_positions)
      for (int p = 0; p < s.r; p += directions.size, to += parts * tile_bytes) {
        one(t, int(std::min<std::int64_t>(step_positions, positions - t)), p,
            std::min(directions.size, s.r - p));
        flip(parts, to, to);
      }
    return packed;
  };
  with_dtype(problem.ref_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) {
      const Matrix &A = problem.ref_A[layer], &B = problem.ref_B[layer];
      if (problem.align != Align::B)
        reference.A = pack(s.k, [&](std::int64_t t, int count, int p, int n) {
          pack_along(at<T>(A, p, t), A.row_stride, n, count, parts, to);
        });
      if (problem.align != Align::A)
        reference.B = pack(s.d, [&](std::int64_t t, int count, int p, int n) {
          pack_across(at<T>(B, t, p), B.row_stride, count, n, tile_rows, parts, to);
        });
    }
  });
  return reference;
}

// Floats of scratch for tile_covariance(): the sums of both factors, and a chunk of a client.
inline std::size_t tile_covariance_scratch(int r) {
  const std::size_t side = Cut(r, tile_rows).whole();
  return 2 * side * side + steps_of(tile_chunk) * most_parts * tile_bytes / sizeof(float);
}

// The share of one factor X of a client in M: C (its directions, the reference's) where it is A,
// the transpose where it is B.
template <class T>
void tile_covariance_of(Side side, const Matrix& X, int rank, int r, std::int64_t positions,
                        const float* reference, int reference_parts, float* C, char* packed) {
  constexpr int parts = parts_in<T>;
  const Cut own(rank, tile_rows), others(r, tile_rows);
  const bool of_A = side == Side::A;
  const std::int64_t c_row = of_A ? others.whole() : own.whole(),
                     tile = reference_parts * tile_bytes;
  const Tiles unit(of_A ? own.size : others.size, of_A ? others.size : own.size, tile_rows, of_A);
  std::fill(C, C + own.whole() * others.whole(), 0.f);
  for (std::int64_t begin = 0; begin < positions; begin += tile_chunk) {
    const int count = int(std::min<std::int64_t>(tile_chunk, positions - begin));
    for (int p = 0; p < rank; p += own.size) {
      const int n = std::min(own.size, rank - p);
      Operand client{packed, tile_row_bytes, parts * tile_bytes, tile_bytes, parts};
      if (parts == 1 && of_A && n == own.size && count % step_positions == 0) {
        const T* data = at<T>(X, p, begin);
        client = {reinterpret_cast<const char*>(data), 2 * X.row_stride, tile_row_bytes, 0, 1};
      } else {
        for (int t = 0; t < count; t += step_positions) {
          char* to = packed + t / step_positions * client.step;
          const int length = std::min(step_positions, count - t);
          if (of_A)
            pack_along(at<T>(X, p, begin + t), X.row_stride, n, length, parts, to);
          else
            pack_across(at<T>(X, begin + t, p), X.row_stride, length, n, tile_rows, parts, to);
        }
      }
      for (int j = 0; j < others.pieces; j += most_swept) {
        const int tiles = std::min(most_swept, others.pieces - j);
        const Operand swept{reinterpret_cast<const char*>(reference) +
                                (begin / step_positions * others.pieces + j) * tile,
                            tile_row_bytes,
                            others.pieces * tile,
                            tile_bytes,
                            reference_parts,
                            tile};
        const std::int64_t q = j * others.size;
        float* to = of_A ? C + p * c_row + q : C + q * c_row + p;
        const std::int64_t next = of_A ? others.size : others.size * c_row;
        load_sums(tiles, to, next, c_row);
        if (of_A)
          multiply<true>(steps_of(count), client, tiles, swept);
        else
          multiply<false>(steps_of(count), client, tiles, swept);
        store_sums(tiles, to, next, c_row);
      }
    }
  }
}

// As covariance() in factors.h.
inline void tile_covariance(const Problem& problem, int layer, int client,
                            const cpu::Reference<float>& reference, float* M, float* scratch) {
  const Layer s = problem.shapes[layer];
  const int r = s.r, index = client * problem.layers + layer, rank = problem.ranks[index];
  const std::int64_t width = Cut(r, tile_rows).whole(), height = Cut(rank, tile_rows).whole();
  const int parts = parts_of(problem.ref_dtype);
  float *of_A = scratch, *of_B = of_A + width * width;
  char* packed = reinterpret_cast<char*>(of_B + width * width);
  std::fill(M, M + r * r, 0.f);
  with_tile_type(problem, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (problem.align != Align::B) {
      tile_covariance_of<T>(Side::A, problem.lora_A[index], rank, r, s.k, reference.A.data, parts,
                            of_A, packed);
      for (int p = 0; p < rank; ++p) std::copy_n(of_A + p * width, r, M + p * r);
    }
    if (problem.align != Align::A) {
      tile_covariance_of<T>(Side::B, problem.lora_B[index], rank, r, s.d, reference.B.data, parts,
                            of_B, packed);
      for (int p = 0; p < rank; ++p)
        for (int q = 0; q < r; ++q) M[p * r + q] += of_B[q * height + p];
    }
  });
}

// How the rank is cut for the average: directions of the result, and of the sum.
struct AverageCut {
  Cut result, sum;
  explicit AverageCut(int r) : result(r, tile_rows), sum(r, 2 * tile_rows, 2) {}
  int pairs() const { return sum.size / 2; }
  // Bytes of one client: the tiles of its weighted rotation, and of a chunk of positions.
  std::int64_t rotation_bytes() const {
    return std::int64_t(sum.pieces) * result.pieces * most_parts * tile_bytes;
  }
  std::int64_t chunk_bytes(int parts) const {
    return std::int64_t(sum.pieces) * (tile_chunk / tile_rows) * parts * tile_bytes;
  }
  // Clients at a time: as many as the second-level cache has room for.
  int clients(int parts) const {
    constexpr int bytes = 256 << 10;
    return std::max(1, std::min(most_clients, bytes / int(chunk_bytes(parts))));
  }
  static constexpr int most_clients = 8;
};

// Floats of scratch for tile_average().
inline std::size_t tile_average_scratch(int r) {
  const AverageCut cut(r);
  std::int64_t bytes = 0;
  for (int parts = 1; parts <= most_parts; ++parts)
    bytes = std::max(bytes, cut.clients(parts) * (cut.rotation_bytes() + cut.chunk_bytes(parts)));
  return bytes / sizeof(float) + std::size_t(cut.result.whole()) * tile_chunk;
}

// Weighted rotations W (last - first, r, r) as tiles [client][piece of the result][step][part].
inline void pack_rotations(const Problem& problem, int layer, Side side, int first, int last,
                           const float* W, char* to) {
  const int r = problem.shapes[layer].r;
  const AverageCut cut(r);
  for (int i = first; i < last; ++i, W += std::size_t(r) * r) {
    const int rank = problem.ranks[i * problem.layers + layer];
    for (int q = 0; q < r; q += cut.result.size)
      for (int p = 0; p < cut.sum.whole(); p += cut.sum.size, to += most_parts * tile_bytes) {
        pack_across(W + p * r + q, r, std::min(cut.sum.size, rank - p),
                    std::min(cut.result.size, r - q), side == Side::A ? tile_rows : cut.pairs(),
                    most_parts, to);
        if (side == Side::A) flip(most_parts, to, to);
      }
  }
}

// Tiles [step][tile of positions] of one client, packed where they cannot be loaded as they lie.
template <class T>
Operand pack_positions(Side side, const Matrix& X, int rank, std::int64_t begin, int count,
                       const AverageCut& cut, char* to) {
  constexpr int parts = parts_in<T>;
  if (parts == 1 && side == Side::B && rank == cut.sum.whole() && count % tile_rows == 0) {
    const std::int64_t row = 2 * X.row_stride;
    return {reinterpret_cast<const char*>(at<T>(X, begin, 0)),
            row,
            2 * cut.sum.size,
            0,
            1,
            row * tile_rows};
  }
  const int tiles = (count + tile_rows - 1) / tile_rows;
  const std::int64_t tile = parts * tile_bytes;
  const Operand operand{to, tile_row_bytes, tiles * tile, tile_bytes, parts, tile};
  for (int p = 0; p < rank; p += cut.sum.size, to += operand.step) {
    const int n = std::min(cut.sum.size, rank - p);
    if (side == Side::A)
      pack_across(at<T>(X, p, begin), X.row_stride, n, count, cut.pairs(), parts, to, tile);
    else
      for (int j = 0; j < tiles; ++j)
        pack_along(at<T>(X, begin + j * tile_rows, p), X.row_stride,
                   std::min(tile_rows, count - j * tile_rows), n, parts, to + j * tile);
  }
  return operand;
}

// `count` positions of clients first <= i < last, cut.clients() at most, from position `begin` on:
// C (r, count) or (count, r), in whole tiles, <- their sum, `continued` after what C holds.
template <class T>
void tile_average_of(const Problem& problem, int layer, Side side, std::int64_t begin, int count,
                     int first, int last, const float* W, bool continued, float* C,
                     std::int64_t row, char* scratch) {
  const bool of_A = side == Side::A;
  const AverageCut cut(problem.shapes[layer].r);
  pack_rotations(problem, layer, side, first, last, W, scratch);
  char* packed = scratch + (last - first) * cut.rotation_bytes();
  Operand positions[AverageCut::most_clients];
  for (int i = first; i < last; ++i, packed += cut.chunk_bytes(parts_in<T>)) {
    const int index = i * problem.layers + layer;
    const Matrix& X = (of_A ? problem.lora_A : problem.lora_B)[index];
    positions[i - first] =
        pack_positions<T>(side, X, problem.ranks[index], begin, count, cut, packed);
  }
  const Tiles unit(of_A ? cut.result.size : tile_rows, of_A ? tile_rows : cut.result.size,
                   cut.pairs(), of_A);
  for (int t = 0; t < count; t += most_swept * tile_rows) {
    const int tiles = std::min(most_swept, (count - t + tile_rows - 1) / tile_rows);
    const std::int64_t next = of_A ? tile_rows : tile_rows * row;
    const char* rotations = scratch;
    for (int q = 0; q < cut.result.whole(); q += cut.result.size) {
      float* to = of_A ? C + q * row + t : C + t * row + q;
      load_sums(tiles, continued ? to : nullptr, next, row);
      for (int i = first; i < last; ++i) {
        const int rank = problem.ranks[i * problem.layers + layer];
        const int steps = (rank + cut.sum.size - 1) / cut.sum.size;
        const Operand rotation{rotations + (i - first) * cut.rotation_bytes(), tile_row_bytes,
                               most_parts * tile_bytes, tile_bytes, most_parts};
        Operand swept = positions[i - first];
        swept.data += t / tile_rows * swept.tile;
        if (of_A)
          multiply<true>(steps, rotation, tiles, swept);
        else
          multiply<false>(steps, rotation, tiles, swept);
      }
      store_sums(tiles, to, next, row);
      rotations += cut.sum.pieces * most_parts * tile_bytes;
    }
  }
}

// Floats of scratch for both passes; the average's end with sums of a chunk.
inline std::size_t tile_scratch(int r) {
  return std::max(tile_covariance_scratch(r),
                  tile_average_scratch(r) + std::size_t(r) * tile_chunk);
}

// Adds clients first <= i < last to C (r, count) or (count, r), as the `add` of average_chunks().
inline void tile_average(const Problem& problem, int layer, Side side, std::int64_t begin,
                         int count, int first, int last, const float* W, float* C, std::int64_t row,
                         float* scratch) {
  const int r = problem.shapes[layer].r;
  const AverageCut cut(r);
  const int rows = side == Side::A ? r : count, cols = side == Side::A ? count : r;
  // Tiles are stored whole.
  const bool fits = cut.result.whole() == r && count % tile_rows == 0;
  float* own = scratch;
  const std::int64_t own_row = side == Side::A ? tile_chunk : cut.result.whole();
  char* rest = reinterpret_cast<char*>(own + cut.result.whole() * tile_chunk);
  auto copy = [&](const float* from, std::int64_t from_row, float* to, std::int64_t to_row) {
    for (int p = 0; p < rows; ++p) std::copy_n(from + p * from_row, cols, to + p * to_row);
  };
  if (!fits && first > 0) copy(C, row, own, own_row);
  with_tile_type(problem, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int i = first, end; i < last; i = end) {
      end = std::min(i + cut.clients(parts_in<T>), last);
      tile_average_of<T>(problem, layer, side, begin, count, i, end,
                         W + std::size_t(i - first) * r * r, i > 0, fits ? C : own,
                         fits ? row : own_row, rest);
    }
  });
  if (!fits) copy(own, own_row, C, row);
}

// As apply() in factors.h.
inline bool tile_apply(const Problem& problem, int layer, Side side, std::int64_t begin,
                       std::int64_t end, int first, int last, const float* W, const Matrix& out,
                       float* sums, float* scratch) {
  float* own_sums = scratch + tile_average_scratch(problem.shapes[layer].r);
  return average_chunks(problem, layer, side, begin, end, last == problem.clients, tile_chunk,
                        problem.ref_dtype == DType::f32, 0, out, sums, own_sums,
                        [&](std::int64_t at, int count, float* C, std::int64_t row) {
                          tile_average(problem, layer, side, at, count, first, last, W, C, row,
                                       scratch);
                        });
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
#endif
