// csrc/cuda/ptx.cuh on the CPU. The fragments of mma and movmatrix are taken apart by the tables of
// the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point type", "movmatrix"): what the
// kernels assume about them is checked against this.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace fedrot::cuda {

inline void* shared_memory() { return cuda_host::shared_memory(); }

inline std::uint16_t f16_bits(float x) {
  const _Float16 rounded = _Float16(x);
  std::uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
inline float from_f16(std::uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof bits);
  return float(x);
}
inline std::uint16_t bf16_bits(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;  // the NaN that cvt gives
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(std::uint16_t bits) { return __uint_as_float(std::uint32_t(bits) << 16); }

inline std::uint16_t half_of(std::uint32_t pair, int which) {
  return std::uint16_t(pair >> 16 * which);
}

inline std::uint32_t transpose8x8(std::uint32_t row) {
  const auto* all = cuda_host::collective(~0u, &row, sizeof row);
  const int lane = cuda_host::lane(), to_row = lane / 4, to_column = lane % 4 * 2;
  std::uint32_t pair = 0;
  for (int e = 0; e < 2; ++e) {  // element (to_column + e, to_row) of the source
    const int from = (to_column + e) * 4 + to_row / 2;
    pair |= std::uint32_t(half_of(cuda_host::shown<std::uint32_t>(all, from), to_row % 2))
            << 16 * e;
  }
  return pair;
}

namespace host {
struct Fragments {
  std::uint32_t a[4], b[2];
};

// Element (row, k) of A: a0, a1 (k < 8) and a4, a5 (k >= 8) belong to row groupID, a2, a3 and
// a6, a7 to groupID + 8; the column is 2 threadID_in_group + (i & 1), + 8 from a4 on.
inline std::uint16_t element_of_a(const cuda_host::Exchange* all, int row, int k) {
  const int lane = row % 8 * 4 + k % 8 / 2;
  const int i = k % 2 + (row < 8 ? 0 : 2) + (k < 8 ? 0 : 4);
  return half_of(cuda_host::shown<Fragments>(all, lane).a[i / 2], i % 2);
}

// Element (k, column) of B: row 2 threadID_in_group + (i & 1), + 8 for b2, b3; column groupID.
inline std::uint16_t element_of_b(const cuda_host::Exchange* all, int k, int column) {
  const int lane = column * 4 + k % 8 / 2;
  const int i = k % 2 + (k < 8 ? 0 : 2);
  return half_of(cuda_host::shown<Fragments>(all, lane).b[i / 2], i % 2);
}
}  // namespace host

template <bool Brain>
void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  host::Fragments mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const auto* all = cuda_host::collective(~0u, &mine, sizeof mine);
  const auto widen = [](std::uint16_t bits) { return Brain ? from_bf16(bits) : from_f16(bits); };
  for (int i = 0; i < 4; ++i) {  // c0, c1: row groupID; c2, c3: groupID + 8
    const int row = cuda_host::lane() / 4 + (i < 2 ? 0 : 8);
    const int column = cuda_host::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      d[i] += widen(host::element_of_a(all, row, k)) * widen(host::element_of_b(all, k, column));
  }
}

}  // namespace fedrot::cuda
