// Elements of factors, four at a time, to and from the accumulator type.
#pragma once

#include "../problem.h"
#include "ptx.cuh"

#include <type_traits>

namespace fedrot::cuda {

using Integer = std::int64_t;

struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;
template <>
constexpr DType dtype_of<BF16> = DType::bf16;
template <>
constexpr DType dtype_of<F16> = DType::f16;

__host__ __device__ __forceinline__ int bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// f(T()) for the type of `dtype`; with float sums nothing is float64.
template <class Acc, class F>
__device__ __forceinline__ void with_type(DType dtype, F f) {
  if constexpr (sizeof(Acc) == sizeof(double))
    if (dtype == DType::f64) return f(double());
  if (dtype == DType::f32) return f(float());
  if (dtype == DType::bf16) return f(BF16());
  f(F16());
}

template <class Acc>
__device__ __forceinline__ Acc widen(double x) {
  return Acc(x);
}
template <class Acc>
__device__ __forceinline__ Acc widen(float x) {
  return x;
}
template <class Acc>
__device__ __forceinline__ Acc widen(BF16 x) {
  return from_bf16(x.bits);
}
template <class Acc>
__device__ __forceinline__ Acc widen(F16 x) {
  return from_f16(x.bits);
}

// To float such that a further rounding to 16 bits gives what rounding x at once would: toward
// zero, the last bit set where anything was cut off.
__device__ __forceinline__ float round_to_odd(double x) {
  const float cut = __double2float_rz(x);
  return double(cut) == x || x != x ? cut : __uint_as_float(__float_as_uint(cut) | 1);
}
__device__ __forceinline__ float round_to_odd(float x) { return x; }

__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, double& to) { to = x; }
template <class Acc>
__device__ __forceinline__ void narrow(Acc x, float& to) {
  to = float(x);
}
template <class Acc>
__device__ __forceinline__ void narrow(Acc x, BF16& to) {
  to.bits = bf16_bits(round_to_odd(x));
}
template <class Acc>
__device__ __forceinline__ void narrow(Acc x, F16& to) {
  to.bits = f16_bits(round_to_odd(x));
}

// Four elements as one access.
template <class T>
struct __align__(sizeof(T) == 2 ? 8 : 16) Four {
  T x[4];
};

// A matrix with contiguous rows of `dtype`, or of T where that is no void.
template <class T>
struct Rows {
  char* data;
  Integer stride;  // in elements
  DType dtype;
  bool aligned;  // elements 0, 4, 8, ... of every row may be read four at a time

  __device__ __forceinline__ Rows(Integer address, Integer stride, DType dtype)
      : data(reinterpret_cast<char*>(address)), stride(stride), dtype(dtype) {
    const Integer alignment = bytes_of(this->dtype) == 2 ? 8 : 16;
    aligned = address % alignment == 0 && stride % 4 == 0;
  }

  template <class Acc, class F>
  __device__ __forceinline__ void with_element_type(F f) const {
    if constexpr (std::is_void_v<T>)
      with_type<Acc>(dtype, f);
    else
      f(T());
  }
};

// values = elements (row, column ..) of which `count` exist, 0 for the rest; column is a multiple
// of 4.
template <class E, class Acc>
__device__ __forceinline__ void load(const E* p, int count, bool aligned, Acc (&values)[4]) {
  if (aligned && count >= 4) {
    const Four<E> four = *reinterpret_cast<const Four<E>*>(p);
    for (int e = 0; e < 4; ++e) values[e] = widen<Acc>(four.x[e]);
  } else {
    for (int e = 0; e < 4; ++e) values[e] = e < count ? widen<Acc>(p[e]) : Acc(0);
  }
}

template <class E, class Acc>
__device__ __forceinline__ void store(E* p, int count, bool aligned, const Acc (&values)[4]) {
  Four<E> four;
  for (int e = 0; e < 4; ++e) narrow(values[e], four.x[e]);
  if (aligned && count >= 4) {
    *reinterpret_cast<Four<E>*>(p) = four;
  } else {
    for (int e = 0; e < 4; ++e)
      if (e < count) p[e] = four.x[e];
  }
}

}  // namespace fedrot::cuda
