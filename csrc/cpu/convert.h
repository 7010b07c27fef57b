// Element types: bfloat16 and float16 beside float and double. Values are widened on load and
// rounded once, to nearest even, on store.
#pragma once

#include <cstdint>
#include <cstring>

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

inline bool is_finite(float x) { return x * 0 == 0; }
inline bool is_finite(double x) { return x * 0 == 0; }
inline bool is_finite(BFloat16 x) { return (x.bits & 0x7f80) != 0x7f80; }
inline bool is_finite(Float16 x) { return (x.bits & 0x7c00) != 0x7c00; }

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

template <class T>
inline bool is(DType dtype) {
  bool same = false;
  with_dtype(dtype, [&](auto* type) { same = std::is_same_v<decltype(type), T*>; });
  return same;
}

#if defined(__AVX512F__)
inline __m512 widen_vector(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 widen_vector(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#elif defined(__AVX2__)
inline __m256 widen_vector(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 widen_vector(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif

// Whether vectors of Acc are loaded from memory that holds T.
template <class Acc, class T>
constexpr bool loads_as =
#if defined(__AVX2__)
    (std::is_same_v<Acc, float> && sizeof(T) == 2) ||
#endif
    std::is_same_v<Acc, T>;

// Calls f with a null pointer of the type that vectors are loaded from: the tensor's own, or Acc
// where it has to be converted beforehand.
template <class Acc, class F>
inline void with_loaded(DType dtype, F f) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    f(static_cast<std::conditional_t<loads_as<Acc, T>, T, Acc>*>(nullptr));
  });
}

template <class Acc, class T>
inline Vector<Acc> load_as(const T* p) {
  if constexpr (std::is_same_v<Acc, T>)
    return load(p);
  else
    return (Vector<Acc>)widen_vector(p);
}

// As load_partial(): nothing beyond p[n - 1] is touched.
template <class Acc, class T>
inline Vector<Acc> load_partial_as(const T* p, int n) {
  if constexpr (std::is_same_v<Acc, T>) {
    return load_partial(p, n);
  } else {
    T padded[lanes<Acc>] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load_as<Acc>(padded);
  }
}

// to[0 .. n) <- from[0 .. n)
template <class T, class Acc>
inline void widen_row(const T* from, std::int64_t n, Acc* to) {
  std::int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 2 && std::is_same_v<Acc, float>)
    for (; i + lanes<float> <= n; i += lanes<float>) store(to + i, load_as<float>(from + i));
#endif
  for (; i < n; ++i) to[i] = Acc(widen(from[i]));
}

// to[0 .. n) <- from[0 .. n), rounded.
template <class Acc, class T>
inline void narrow_row(const Acc* from, int n, T* to) {
  int i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Acc, float>)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256((__m256i*)(to + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Acc, float>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) narrow(from[i], to[i]);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
