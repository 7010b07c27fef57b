#include "library.h"

#include "rotate.cuh"

using fedrot::DType;

const char* fedrot_cuda_run(const fedrot::cuda::Call* call, const fedrot::device::Launch* launches,
                            std::int64_t count, void* stream) {
  const auto client = DType(call->client_dtype);
  const bool is_double = client == DType::f64 || DType(call->ref_dtype) == DType::f64;
  auto* step = is_double               ? fedrot::cuda::step_f64
               : client == DType::f32  ? fedrot::cuda::step_f32
               : client == DType::bf16 ? fedrot::cuda::step_bf16
                                       : fedrot::cuda::step_f16;
  for (std::int64_t i = 0; i < count; ++i)
    if (const char* error = step(*call, launches[i], stream)) return error;
  return nullptr;
}

std::int64_t fedrot_cuda_workspace_elements(std::int64_t n) {
  return fedrot::cuda::workspace_elements(n);
}
