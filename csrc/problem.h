// What a call is: pointer tables, sizes and strides. Shared by cpu/ and cuda/; owns nothing.
#pragma once

#include <cstdint>

namespace fedrot {

enum class DType : int { f64, f32, bf16, f16 };
enum class Align : int { joint, A, B };

// A row-major matrix whose rows are contiguous; row_stride in elements.
struct Matrix {
  void* data;
  std::int64_t row_stride;
};

// Sizes of one adapted layer: A is (r, k), B is (d, r).
struct Layer {
  std::int64_t d, k;
  int r;
};

// N clients x L layers. Client tables are client-major: entry [i * L + l].
struct Problem {
  int clients, layers;
  DType client_dtype, ref_dtype;  // outputs have ref_dtype
  const Layer* shapes;            // (L)
  const int* ranks;               // (N * L), 1 <= ranks[i * L + l] <= shapes[l].r
  const Matrix* lora_A;           // (N * L), (r_i, k)
  const Matrix* lora_B;           // (N * L), (d, r_i)
  const Matrix* ref_A;            // (L), (r, k)
  const Matrix* ref_B;            // (L), (d, r)
  const double* weights;          // (N), sum 1
  double lam;
  Align align;
  bool proper;
};

}  // namespace fedrot
