// Vectors of float or double as wide as the instruction set this file is compiled for, through the
// compiler's own vector types: the same source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstring>

#include "../math/group.h"

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

// Lanes are added pairwise, in the same order on every call.
template <class T>
inline T horizontal_sum(Vector<T> v) {
  T parts[lanes<T>];
  std::memcpy(parts, &v, sizeof v);
  for (int half = lanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
