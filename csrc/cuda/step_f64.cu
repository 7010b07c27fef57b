// Everything in float64, clients of any dtype: nothing here is tuned, so two sizes do.
#include "library.h"
#include "step.cuh"

namespace fedrot::cuda {

const char* step_f64(const Call& call, const device::Launch& range, void* stream) {
  const auto in = static_cast<cudaStream_t>(stream);
  if (call.largest_rank <= 16) return launch_step<16, void, double>(call, range, in);
  return launch_step<64, void, double>(call, range, in);
}

}  // namespace fedrot::cuda
