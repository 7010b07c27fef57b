// Who works on one small matrix: the loops and reductions that the r x r mathematics is written
// in. Serial is one CPU thread; a GPU group (a warp, a block) provides the same five members. A
// group may overload any function of math/ that takes a group (see cpu/simd_group.h).
//
// Everything here and in the other math/ headers lives in an inline namespace named after the
// instruction set, since each kernel file is compiled several times and the linker must never
// take an AVX-512 copy of a function for a machine without it.
#pragma once

#ifndef FEDROT_ISA
#define FEDROT_ISA portable
#endif

#if defined(__CUDACC__)
#define FEDROT_HD __host__ __device__ __forceinline__
#define FEDROT_HD_LARGE __host__ __device__ __noinline__  // called from several places
#else
#define FEDROT_HD inline
#define FEDROT_HD_LARGE inline
#endif

// Iterations of the loop that follows touch different elements: it may be vectorised.
#if defined(__clang__)
#define FEDROT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__CUDA_ARCH__)
#define FEDROT_INDEPENDENT
#else
#define FEDROT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fedrot {
inline namespace FEDROT_ISA {

struct Serial {
  // f(i) for 0 <= i < n, in any order.
  template <class F>
  FEDROT_HD void each(int n, F f) const {
    FEDROT_INDEPENDENT
    for (int i = 0; i < n; ++i) f(i);
  }
  // f(i, j) for 0 <= i < rows, 0 <= j < cols, in any order.
  template <class F>
  FEDROT_HD void each(int rows, int cols, F f) const {
    for (int i = 0; i < rows; ++i) {
      FEDROT_INDEPENDENT
      for (int j = 0; j < cols; ++j) f(i, j);
    }
  }
  // Sum of f(i); every member of the group gets it.
  template <class T, class F>
  FEDROT_HD T sum(int n, F f) const {
    T total = 0;
    for (int i = 0; i < n; ++i) total += f(i);
    return total;
  }
  // The first i with the largest f(i) among begin <= i < end; every member of the group gets it.
  template <class F>
  FEDROT_HD int argmax(int begin, int end, F f) const {
    int best = begin;
    auto value = f(begin);
    for (int i = begin + 1; i < end; ++i) {
      auto candidate = f(i);
      if (candidate > value) value = candidate, best = i;
    }
    return best;
  }
  // Everything written before is visible to the whole group after.
  FEDROT_HD void sync() const {}
};

}  // namespace FEDROT_ISA
}  // namespace fedrot
