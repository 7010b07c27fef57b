// The table of a call (device.h), by its sections.
#pragma once

#include "../device.h"
#include "call.h"
#include "ptx.cuh"

namespace fedrot::cuda {

using Integer = std::int64_t;

// The sections of the table.
struct Table {
  const Integer* bases;
  const device::LayerRow* layers;
  const device::ClientRow* clients;
  const device::Unit *covariance_units, *apply_units;

  __device__ __forceinline__ explicit Table(const Call& call)
      : bases(call.table),
        layers(reinterpret_cast<const device::LayerRow*>(call.table + call.layers_at)),
        clients(reinterpret_cast<const device::ClientRow*>(call.table + call.clients_at)),
        covariance_units(
            reinterpret_cast<const device::Unit*>(call.table + call.covariance_units_at)),
        apply_units(reinterpret_cast<const device::Unit*>(call.table + call.apply_units_at)) {}
};

}  // namespace fedrot::cuda
