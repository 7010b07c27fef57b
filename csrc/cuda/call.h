// What the launchers of this directory are given. Plain C, so that Python can fill it in
// (fedrot_kernels/backends/cuda.py has the same list of fields).
#pragma once

#include <cstdint>

namespace fedrot::cuda {

// A call laid out by device.h, with its buffers: everything in device memory but this struct.
struct Call {
  const std::int64_t* table;
  std::int64_t layers_at, clients_at, covariance_units_at, apply_units_at;  // sections of it
  void* partials;
  std::int32_t* counters;  // (clients * layers), zero between launches
  void* workspaces;        // `slots` of workspace_elements(largest rank)
  std::int32_t* taken;     // (slots), zero between launches
  const double* weights;   // (clients), or null: uniform
  std::int64_t clients, layers, slots, largest_rank;
  double lam;
  std::int32_t client_dtype, ref_dtype, proper;  // dtypes as problem.h numbers them
  std::int32_t weighted;  // rotations are scaled by the weights: align_aggregate, not align
};

// A batch of matrices (count, rows, n), to polar factors.
struct Polar {
  const void* M;
  void* out;
  void* workspaces;
  std::int32_t* taken;
  std::int64_t count, rows, n, slots;
  std::int32_t is_double, proper;
};

}  // namespace fedrot::cuda
