// The instructions that CUDA C++ has no plain name for, each a function of one warp or one thread.
// Nothing else in csrc/cuda holds assembly. Without nvcc the same functions come from a CPU
// emulation (tests/kernels/cuda_host), so that tests run the kernels as they are.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include "ptx_host.h"
#else

namespace fedrot::cuda {

// The shared memory that a launch asked for, aligned to 16 bytes.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 fedrot_shared[];
  return fedrot_shared;
}

// Bits of a 16-bit float, rounded to nearest even, and back.
__device__ __forceinline__ std::uint16_t f16_bits(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ std::uint16_t bf16_bits(float x) {
  std::uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ float from_f16(std::uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ float from_bf16(std::uint16_t bits) {
  return __uint_as_float(std::uint32_t(bits) << 16);
}

// An 8 x 8 matrix of 16-bit elements, transposed: lane i holds elements 2 (i % 4) and the next of
// row i / 4, before and after.
__device__ __forceinline__ std::uint32_t transpose8x8(std::uint32_t row) {
  std::uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(row));
  return transposed;
}

// D (16, 8) += A (16, 16) B (16, 8) in float32, the operands in the fragment layout of
// mma.m16n8k16. Brain: bfloat16, else float16.
template <bool Brain>
__device__ __forceinline__ void multiply_add(float (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2]) {
  if constexpr (Brain)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fedrot::cuda

#endif
