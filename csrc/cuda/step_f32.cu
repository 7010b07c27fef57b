#include "library.h"
#include "step.cuh"

namespace fedrot::cuda {

const char* step_f32(const Call& call, const device::Launch& range, void* stream) {
  return step_of<float, float>(call, range, static_cast<cudaStream_t>(stream));
}

}  // namespace fedrot::cuda
