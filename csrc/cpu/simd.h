// Vectors of float or double as wide as the instruction set this file is compiled for, through the
// compiler's own vector types: the same source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../math/group.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The loop that follows has few iterations, known to the compiler: its arrays may stay in
// registers.
#if defined(__clang__)
#define FEDROT_UNROLL _Pragma("unroll")
#else
#define FEDROT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fedrot {
inline namespace FEDROT_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int lanes = vector_bytes / int(sizeof(T));

// f(0), ..., f(n - 1). Written out for the compiler, so that arrays of vectors stay in registers.
template <int n, class F>
__attribute__((always_inline)) inline void unrolled(F&& f) {
  if constexpr (n > 0) {
    unrolled<n - 1>(f);
    f(n - 1);
  }
}

// All bits of a lane set: true. The integers have the size of T.
template <class T>
using Mask = decltype(Vector<T>{} < Vector<T>{});

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vector<T> magnitude_of(Vector<T> x) {
  return x < 0 ? -x : x;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits set in the first n lanes.
template <class T>
inline __m256i first_lanes(int n) {
  static constexpr std::int32_t bits[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const std::int32_t* from = bits + 8 - n * int(sizeof(T) / 4);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
#endif

// The first n lanes, zero in the others; memory beyond p[n - 1] is not touched. 0 < n <= lanes.
template <class T>
inline Vector<T> load_partial(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (Vector<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm256_maskload_ps(p, first_lanes<T>(n));
  else
    return (Vector<T>)_mm256_maskload_pd(p, first_lanes<T>(n));
#else
  Vector<T> v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

template <class T>
inline void store_partial(T* p, Vector<T> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  // By halves: masked stores are slow on processors by AMD.
  if (n == lanes<T>) return store(p, v);
  if constexpr (sizeof(T) == 4) {
    __m128 part = _mm256_castps256_ps128((__m256)v);
    if (n & 4) {
      _mm_storeu_ps(p, part);
      part = _mm256_extractf128_ps((__m256)v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      part = _mm_movehl_ps(part, part);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, part);
  } else {
    __m128d part = _mm256_castpd256_pd128((__m256d)v);
    if (n & 2) {
      _mm_storeu_pd(p, part);
      part = _mm256_extractf128_pd((__m256d)v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, part);
  }
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
