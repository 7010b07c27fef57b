// Launches a kernel in a stream; returns what went wrong, or null.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fedrot::cuda {

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads,
                   std::size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  constexpr std::int64_t most_blocks = 0x7fffffff;
  constexpr std::size_t without_asking = 48 * 1024;
  if (blocks == 0) return nullptr;
  if (blocks > most_blocks) return "more work in one launch than a grid can hold";
  cudaError_t error = cudaSuccess;
  if (shared_bytes > without_asking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  const cudaError_t last = cudaGetLastError();  // and forgets it: the next launch is another one
  if (error == cudaSuccess) error = last;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fedrot::cuda
