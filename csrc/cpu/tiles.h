// Products on the matrix unit of recent Xeons (AMX): sums of tiles of 16 rows of 16 pairs of
// bfloat16, accumulated in float. What is multiplied with bfloat16 and is none itself is a sum of
// up to three of them: float16 is exact so, float keeps its 24 bits. Subnormal numbers count as
// zero.
#pragma once

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "convert.h"
#include "shuffle.h"

namespace fedrot {
inline namespace FEDROT_ISA {

constexpr int tile_rows = 16, tile_row_bytes = 64, tile_bytes = tile_rows * tile_row_bytes,
              most_parts = 3, most_swept = 4;

// bfloat16 numbers that hold one of this type.
inline int parts_of(DType dtype) {
  return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : most_parts;
}

// n in as few pieces of at most `most` as there can be, all of one size: the last reaches beyond
// n where that is no multiple.
struct Cut {
  int pieces, size;
  Cut(int n, int most, int multiple = 1) {
    pieces = (n + most - 1) / most;
    size = ((n + pieces - 1) / pieces + multiple - 1) / multiple * multiple;
  }
  int whole() const { return pieces * size; }
};

// One side of a product: for every step of the sum some tiles, each in parts. Distances in bytes.
struct Operand {
  const char* data;
  std::int64_t row, step, part;
  int parts;
  std::int64_t tile = 0;
};

// The unit set up for sums (rows, cols) of products of `pairs` pairs a step, and free again at the
// end: what it holds would be saved with every switch of threads.
class Tiles {
 public:
  // held_left: the operand that multiply() keeps is the left one, its pairs along rows.
  Tiles(int rows, int cols, int pairs, bool held_left) {
    struct alignas(64) Shapes {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
      void set(int first, int last, int n, int lanes) {
        for (int i = first; i <= last; ++i) rows[i] = std::uint8_t(n), row_bytes[i] = 4 * lanes;
      }
    } shapes;
    shapes.set(0, 3, rows, cols);
    shapes.set(4, 6, held_left ? rows : pairs, held_left ? pairs : cols);
    shapes.set(7, 7, held_left ? pairs : rows, held_left ? cols : pairs);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The sums of up to four tiles `next` elements apart, rows c_row apart; zero where C is null.
inline void load_sums(int count, const float* C, std::int64_t next, std::int64_t c_row) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (!C) return;
  _tile_loadd(0, C, 4 * c_row);
  if (count > 1) _tile_loadd(1, C + next, 4 * c_row);
  if (count > 2) _tile_loadd(2, C + 2 * next, 4 * c_row);
  if (count > 3) _tile_loadd(3, C + 3 * next, 4 * c_row);
}
inline void store_sums(int count, float* C, std::int64_t next, std::int64_t c_row) {
  _tile_stored(0, C, 4 * c_row);
  if (count > 1) _tile_stored(1, C + next, 4 * c_row);
  if (count > 2) _tile_stored(2, C + 2 * next, 4 * c_row);
  if (count > 3) _tile_stored(3, C + 3 * next, 4 * c_row);
}

// Adds the products of a tile of one operand with `count` tiles of the other, over all steps.
template <bool held_left>
inline void multiply(int steps, Operand held, int count, const Operand& swept) {
  asm volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
  const int held_parts = held.parts, parts = swept.parts;
  const std::int64_t row = swept.row, part = swept.part;
  const char* others = swept.data;
  for (int s = 0; s < steps; ++s, held.data += held.step, others += swept.step) {
    _tile_loadd(4, held.data, held.row);
    if (held_parts > 1) _tile_loadd(5, held.data + held.part, held.row);
    if (held_parts > 2) _tile_loadd(6, held.data + 2 * held.part, held.row);
#define FEDROT_ADD(sums, tile)       \
  {                                  \
    if constexpr (held_left)         \
      _tile_dpbf16ps(sums, tile, 7); \
    else                             \
      _tile_dpbf16ps(sums, 7, tile); \
  }
#define FEDROT_SWEEP(sums)                                      \
  for (int q = 0; q < parts; ++q) {                             \
    _tile_loadd(7, others + sums * swept.tile + q * part, row); \
    FEDROT_ADD(sums, 4)                                         \
    if (held_parts > 1) FEDROT_ADD(sums, 5)                     \
    if (held_parts > 2) FEDROT_ADD(sums, 6)                     \
  }
    FEDROT_SWEEP(0)
    if (count > 1) {
      FEDROT_SWEEP(1)
    }
    if (count > 2) {
      FEDROT_SWEEP(2)
    }
    if (count > 3) {
      FEDROT_SWEEP(3)
    }
#undef FEDROT_SWEEP
#undef FEDROT_ADD
  }
}

// The first n <= 16 numbers as parts, zeros behind them.
template <class T>
inline void load_parts(const T* from, int n, int parts, __m256i* to) {
  const auto lanes_used = __mmask16((1u << n) - 1);
  if constexpr (std::is_same_v<T, BFloat16>) {
    *to = _mm256_maskz_loadu_epi16(lanes_used, from);
  } else {
    __m512 rest;
    if constexpr (std::is_same_v<T, Float16>)
      rest = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_used, from));
    else
      rest = _mm512_maskz_loadu_ps(lanes_used, from);
    for (int p = 0; p < parts; ++p) {
      to[p] = (__m256i)_mm512_cvtneps_pbh(rest);
      rest -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to[p]), 16));
    }
  }
}

// One row of pairs, numbers of two rows in turns, for tiles of 16 columns, `tile` bytes apart, each
// in parts one after the other. odd may be null: zeros.
template <class T>
inline void pack_pairs(const T* even, const T* odd, int columns, int parts, char* to,
                       std::int64_t tile) {
  int t = 0;
  if constexpr (std::is_same_v<T, BFloat16>)
    if (odd) {  // the same without conversion and masks
      alignas(64) static constexpr std::uint16_t turns[2][32] = {
          {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
          {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
      const __m512i first = _mm512_load_si512(turns[0]), second = _mm512_load_si512(turns[1]);
      for (; t + 32 <= columns; t += 32, to += 2 * tile) {
        const __m512i a = _mm512_loadu_si512(even + t), b = _mm512_loadu_si512(odd + t);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(to + tile, _mm512_permutex2var_epi16(a, second, b));
      }
      for (; t + 16 <= columns; t += 16, to += tile) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + t)),
                      b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + t));
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), first,
                                                          _mm512_castsi256_si512(b)));
      }
    }
  for (; t < columns; t += 16, to += tile) {
    const int n = std::min(16, columns - t);
    __m256i a[most_parts] = {}, b[most_parts] = {};
    load_parts(even + t, n, parts, a);
    if (odd) load_parts(odd + t, n, parts, b);
    for (int p = 0; p < parts; ++p)
      _mm512_storeu_si512(to + p * tile_bytes,
                          _mm512_or_si512(_mm512_cvtepu16_epi32(a[p]),
                                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(b[p]), 16)));
  }
}

// `pairs` rows of them for a sum over n rows of X, zero beyond.
template <class T>
inline void pack_across(const T* X, std::int64_t row, int n, int columns, int pairs, int parts,
                        char* to, std::int64_t tile = 0) {
  for (; pairs > 0; --pairs, X += 2 * row, n -= 2, to += tile_row_bytes) {
    if (n > 0) {
      pack_pairs(X, n > 1 ? X + row : nullptr, columns, parts, to, tile);
      continue;
    }
    for (int t = 0; t < columns; t += 16)
      for (int p = 0; p < parts; ++p)
        _mm512_storeu_si512(to + t / 16 * tile + p * tile_bytes, _mm512_setzero_si512());
  }
}

// One tile, in parts, whose pairs are neighbours in a row: for a sum over n <= 32 columns.
template <class T>
inline void pack_along(const T* X, std::int64_t row, int rows, int n, int parts, char* to) {
  for (int i = 0; i < tile_rows; ++i, X += row, to += tile_row_bytes) {
    __m256i first[most_parts] = {}, second[most_parts] = {};
    if (i < rows) load_parts(X, std::min(n, 16), parts, first);
    if (i < rows && n > 16) load_parts(X + 16, n - 16, parts, second);
    for (int p = 0; p < parts; ++p)
      _mm512_storeu_si512(to + p * tile_bytes,
                          _mm512_inserti64x4(_mm512_castsi256_si512(first[p]), second[p], 1));
  }
}

// Rows of pairs <- columns of pairs, in place: from one side of a product to the other.
inline void flip(int parts, char* tile) {
  for (int p = 0; p < parts; ++p, tile += tile_bytes) {
    float* pairs = reinterpret_cast<float*>(tile);
    Vector<float> rows[tile_rows];
    for (int i = 0; i < tile_rows; ++i) rows[i] = load(pairs + 16 * i);
    transpose<float>(rows);
    for (int i = 0; i < tile_rows; ++i) store(pairs + 16 * i, rows[i]);
  }
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
#endif
