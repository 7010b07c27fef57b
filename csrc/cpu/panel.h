// Panels: blocks of a factor in the accumulator type, one row per rank direction, `panel_ld`
// elements apart. A (r, k) is cut along k; B (d, r) along d and transposed on the way, so that
// all arithmetic sees one layout. Values are widened on load and rounded once on store.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../problem.h"
#include "simd.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fedrot {
inline namespace FEDROT_ISA {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline float as_float(std::uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline std::uint32_t as_bits(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return as_float(std::uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Exponent re-biased by a multiplication, which also makes subnormals right.
  const std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fff) << 13;
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  if (magnitude >= 0x0f800000) return as_float(sign | magnitude | 0x7f800000);  // inf, nan
  return as_float(as_bits(as_float(magnitude) * 0x1p112f) | sign);
#endif
}

inline void narrow(double x, float& y) { y = float(x); }
inline void narrow(double x, double& y) { y = x; }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, double& y) { y = x; }
inline void narrow(float x, BFloat16& y) {  // to nearest, ties to even; nan stays nan
  const std::uint32_t bits = as_bits(x);
  if (x != x) {
    y.bits = std::uint16_t((bits >> 16) | 0x40);
  } else {
    y.bits = std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
inline void narrow(float x, Float16& y) {
#if defined(__F16C__)
  y.bits = std::uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const std::uint32_t bits = as_bits(x), sign = bits & 0x80000000u;
  std::uint32_t magnitude = bits ^ sign;
  if (magnitude > 0x7f800000) {  // nan
    magnitude = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to infinity
    magnitude = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the float adder aligns and rounds
    magnitude = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    magnitude = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  y.bits = std::uint16_t((sign >> 16) | magnitude);
#endif
}
// float64 accumulators meet half precision outputs only where clients are float64: rounding to
// float with ties broken to odd first keeps the second rounding correct.
template <class H>
inline void narrow_double(double x, H& y) {
  float f = float(x);
  if (double(f) != x && f == f && (as_bits(f) & 1) == 0) {
    const bool away = (f < 0 ? -double(f) : double(f)) > (x < 0 ? -x : x);
    f = as_float(away ? as_bits(f) - 1 : as_bits(f) + 1);
  }
  narrow(f, y);
}
inline void narrow(double x, BFloat16& y) { narrow_double(x, y); }
inline void narrow(double x, Float16& y) { narrow_double(x, y); }

// Calls f with a null pointer of the element type.
template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<Float16*>(nullptr));
  }
}

// Which way a factor is cut: rows of the panel are rows of A, or columns of B.
enum class Side { A, B };

// panel[p][t] <- factor direction p, position begin + t, for p < rank, t < count; zero up to the
// next multiple of the vector length.
template <class Acc>
inline void load_panel(Side side, DType dtype, const Matrix& m, int rank, std::int64_t begin,
                       int count, Acc* panel, int ld) {
  const int padded = (count + lanes<Acc> - 1) / lanes<Acc> * lanes<Acc>;
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(m.data);
    const std::int64_t stride = m.row_stride;
    if (side == Side::A) {
      for (int p = 0; p < rank; ++p) {
        const T* row = data + p * stride + begin;
        for (int t = 0; t < count; ++t) panel[p * ld + t] = Acc(widen(row[t]));
      }
    } else {
      const T* rows = data + begin * stride;
      int p = 0;
      for (; p + 4 <= rank; p += 4)  // four at a time: contiguous reads, four write streams
        for (int t = 0; t < count; ++t)
          for (int q = p; q < p + 4; ++q) panel[q * ld + t] = Acc(widen(rows[t * stride + q]));
      for (; p < rank; ++p)
        for (int t = 0; t < count; ++t) panel[p * ld + t] = Acc(widen(rows[t * stride + p]));
    }
  });
  for (int p = 0; p < rank; ++p)
    for (int t = count; t < padded; ++t) panel[p * ld + t] = 0;
}

// n rounded up to two vectors.
template <class Acc>
constexpr int padded(int n) {
  return (n + 2 * lanes<Acc> - 1) / (2 * lanes<Acc>)*(2 * lanes<Acc>);
}

// The same block the other way round: panel[t][p], zero for rank <= p < ld.
template <class Acc>
inline void load_positions(Side side, DType dtype, const Matrix& m, int rank, std::int64_t begin,
                           int count, Acc* panel, int ld) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(m.data);
    const std::int64_t along = side == Side::A ? 1 : m.row_stride;
    const std::int64_t across = side == Side::A ? m.row_stride : 1;
    for (int t = 0; t < count; ++t)
      for (int p = 0; p < rank; ++p)
        panel[t * ld + p] = Acc(widen(data[(begin + t) * along + p * across]));
  });
  for (int t = 0; t < count; ++t)
    for (int p = rank; p < ld; ++p) panel[t * ld + p] = 0;
}

// The inverse of load_panel. Returns whether every stored value is finite: a finite sum may still
// overflow the narrower type that it is rounded to.
template <class Acc>
inline bool store_panel(Side side, DType dtype, const Matrix& m, int rank, std::int64_t begin,
                        int count, const Acc* panel, int ld) {
  Acc zero = 0;  // stays 0 unless a value is not finite
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* data = static_cast<T*>(m.data);
    const std::int64_t stride = m.row_stride;
    auto put = [&](int p, int t, T& out) {
      narrow(panel[p * ld + t], out);
      zero += Acc(widen(out)) * 0;
    };
    if (side == Side::A) {
      for (int p = 0; p < rank; ++p)
        for (int t = 0; t < count; ++t) put(p, t, data[p * stride + begin + t]);
    } else {
      for (int t = 0; t < count; ++t)
        for (int p = 0; p < rank; ++p) put(p, t, data[(begin + t) * stride + p]);
    }
  });
  return zero == 0;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
