#include "library.h"
#include "step.cuh"

namespace fedrot::cuda {

const char* step_f16(const Call& call, const device::Launch& range, void* stream) {
  return step_of<F16, float>(call, range, static_cast<cudaStream_t>(stream));
}

}  // namespace fedrot::cuda
