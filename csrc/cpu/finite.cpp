#include "finite.h"

#include <atomic>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace fedrot::cpu {
namespace {

// Bits of an IEEE number; NaN and infinity are those with every bit of the exponent set.
template <class Bits>
bool is_finite(const Matrix& matrix, std::int64_t rows, std::int64_t columns, Bits exponent) {
  if (matrix.row_stride == columns) columns *= rows, rows = 1;  // short rows: one long one
  for (std::int64_t row = 0; row < rows; ++row) {
    const char* values =
        static_cast<const char*>(matrix.data) + row * matrix.row_stride * sizeof(Bits);
    Bits bad = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
      Bits bits;
      std::memcpy(&bits, values + i * sizeof(Bits), sizeof(Bits));
      bad |= Bits((bits & exponent) == exponent);
    }
    if (bad) return false;
  }
  return true;
}

bool is_finite(const Matrix& matrix, std::int64_t rows, std::int64_t columns, DType dtype) {
  switch (dtype) {
    case DType::f64:
      return is_finite<std::uint64_t>(matrix, rows, columns, 0x7ff0000000000000);
    case DType::f32:
      return is_finite<std::uint32_t>(matrix, rows, columns, 0x7f800000);
    case DType::bf16:
      return is_finite<std::uint16_t>(matrix, rows, columns, 0x7f80);
    case DType::f16:
      return is_finite<std::uint16_t>(matrix, rows, columns, 0x7c00);
  }
  return false;
}

}  // namespace

bool unread_is_finite(const Problem& p, bool averaged, int threads) {
  std::atomic<bool> finite{true};
  for (const Side side : {Side::A, Side::B}) {
    if (is_aligned(p, side)) continue;
    const Matrix* const ref = side == Side::A ? p.ref_A : p.ref_B;
    const Matrix* const lora = side == Side::A ? p.lora_A : p.lora_B;
    const int of_clients = averaged ? 0 : p.clients * p.layers;
    parallel_for(p.layers + of_clients, threads, [&](int unit, int) {
      const bool is_ref = unit < p.layers;
      const int index = is_ref ? unit : unit - p.layers;
      const Layer& shape = p.shapes[index % p.layers];
      const int rank = is_ref ? shape.r : p.ranks[index];
      const std::int64_t rows = side == Side::A ? rank : shape.d;
      const std::int64_t columns = side == Side::A ? shape.k : rank;
      const Matrix& matrix = is_ref ? ref[index] : lora[index];
      if (!is_finite(matrix, rows, columns, is_ref ? p.ref_dtype : p.client_dtype)) finite = false;
    });
  }
  return finite;
}

}  // namespace fedrot::cpu
