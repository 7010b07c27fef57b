// The functions of the shared library `_cuda`, called from Python by name (backends/cuda.py). It
// needs neither Python nor torch. Each returns null, or what went wrong; none waits for the GPU,
// allocates or copies.
#pragma once

#include "../device.h"
#include "call.h"

#define FEDROT_EXPORT extern "C" __attribute__((visibility("default")))

// All launches of a call, in order.
FEDROT_EXPORT const char* fedrot_cuda_run(const fedrot::cuda::Call* call,
                                          const fedrot::device::Launch* launches,
                                          std::int64_t count, void* stream);
FEDROT_EXPORT const char* fedrot_cuda_polar(const fedrot::cuda::Polar* batch, void* stream);
// Elements (float32 or float64) of a workspace for rank n.
FEDROT_EXPORT std::int64_t fedrot_cuda_workspace_elements(std::int64_t n);

namespace fedrot::cuda {

// One launch by client dtype; Step_f64 is for all where anything is float64.
const char* step_f64(const Call&, const device::Launch&, void* stream);
const char* step_f32(const Call&, const device::Launch&, void* stream);
const char* step_bf16(const Call&, const device::Launch&, void* stream);
const char* step_f16(const Call&, const device::Launch&, void* stream);

}  // namespace fedrot::cuda
