// Products on the matrix unit of recent Xeons (AMX): sums of tiles of 16 rows of 16 pairs of
// bfloat16, accumulated in float. Other numbers are exact sums of parts, bfloat16 again: two of a
// float16, three of a float. Subnormal numbers count as zero.
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

// Positions in one step of a sum over positions, in pairs.
constexpr int step_positions = 2 * tile_rows;
inline int steps_of(std::int64_t positions) {
  return int((positions + step_positions - 1) / step_positions);
}

// bfloat16 numbers that hold one of this type.
template <class T>
constexpr int parts_in = std::is_same_v<T, BFloat16> ? 1
                         : sizeof(T) == 2            ? 2
                                                     : most_parts;
inline int parts_of(DType dtype) {
  int parts = 0;
  with_dtype(dtype, [&](auto* type) { parts = parts_in<std::remove_pointer_t<decltype(type)>>; });
  return parts;
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
    asm volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The sums of up to four tiles `next` elements apart, rows c_row apart; zero where C is null.
inline void load_sums(int count, const float* C, std::int64_t next, std::int64_t c_row) {
  // To the compiler tiles come from nowhere: what they are loaded from has to be stored by now.
  asm volatile("" ::: "memory");
  if (!C) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
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

// Adds the products of a tile of one operand with `count` tiles of the other, over all steps. Of
// products of parts those that a float resolves.
template <bool held_left>
inline void multiply(int steps, Operand held, int count, const Operand& swept) {
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
#define FEDROT_SWEEP(sums)                                        \
  for (int q = 0; q < parts; ++q) {                               \
    _tile_loadd(7, others + sums * swept.tile + q * part, row);   \
    FEDROT_ADD(sums, 4)                                           \
    if (held_parts > 1 && q + 1 < most_parts) FEDROT_ADD(sums, 5) \
    if (held_parts > 2 && q + 2 < most_parts) FEDROT_ADD(sums, 6) \
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

// The first n <= 16 numbers as bits of floats, zeros behind them.
template <class T>
inline __m512i load_bits(const T* from, int n) {
  const auto first = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_loadu_epi32(first, from);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, from)), 16);
  else
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first, from)));
}

// A part is the upper half of the bits of a float: it never overflows. This is what it leaves.
inline __m512i after_part(__m512i x) {
  const __m512i part = _mm512_and_si512(x, _mm512_set1_epi32(-65536));
  return _mm512_castps_si512(_mm512_castsi512_ps(x) - _mm512_castsi512_ps(part));
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
    __m512i a = load_bits(even + t, n), b = odd ? load_bits(odd + t, n) : _mm512_setzero_si512();
    for (int p = 0; p < parts; ++p, a = after_part(a), b = after_part(b))
      _mm512_storeu_si512(to + p * tile_bytes,
                          _mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), 0xaaaaaaaa, b));
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
  alignas(64) static constexpr std::uint16_t uppers[32] = {
      1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(uppers), zero = _mm512_setzero_si512();
  for (int i = 0; i < tile_rows; ++i, X += row, to += tile_row_bytes) {
    __m512i a = i < rows ? load_bits(X, std::min(n, 16)) : zero;
    __m512i b = i < rows && n > 16 ? load_bits(X + 16, n - 16) : zero;
    for (int p = 0; p < parts; ++p, a = after_part(a), b = after_part(b))
      _mm512_storeu_si512(to + p * tile_bytes, _mm512_permutex2var_epi16(a, upper, b));
  }
}

// Rows of pairs <- columns of pairs: from one side of a product to the other. May be in place.
inline void flip(int parts, const char* tile, char* to) {
  for (int p = 0; p < parts; ++p, tile += tile_bytes, to += tile_bytes) {
    const float* pairs = reinterpret_cast<const float*>(tile);
    Vector<float> rows[tile_rows];
    for (int i = 0; i < tile_rows; ++i) rows[i] = load(pairs + 16 * i);
    transpose<float>(rows);
    for (int i = 0; i < tile_rows; ++i) store(reinterpret_cast<float*>(to) + 16 * i, rows[i]);
  }
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
#endif
