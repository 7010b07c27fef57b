// A call as kernels on a device read it: one table of 64-bit integers in device memory and a few
// buffers beside it. Shared by csrc/cuda (as these structs) and fedrot_kernels/backends/triton.py
// (as columns of the sections). Host code; owns no device memory.
//
// Work is cut into units of consecutive positions: columns of A, rows of B. A covariance unit gives
// one partial M per client, in a slot of its own; an apply unit gives output positions from all
// clients. The cut depends on sizes alone, so the order of every sum does too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tables.h"

namespace fedrot::device {

using Integer = std::int64_t;
using Address = std::int64_t;  // in bytes

enum Side : Integer { columns_of_A = 0, rows_of_B = 1 };

struct LayerRow {
  Integer d, k, r;
  Address ref_A;  // (r, k); strides in elements
  Integer ref_A_stride;
  Address ref_B;  // (d, r)
  Integer ref_B_stride;
  Address out_A;  // (r, k), or 0 where only rotations are wanted
  Integer out_A_stride;
  Address out_B;  // (d, r)
  Integer out_B_stride;
  Integer first_unit, units;  // its covariance units
};

struct ClientRow {
  Address A;  // (rank, k), relative to bases[client]
  Integer A_stride;
  Address B;  // (d, rank), relative to bases[client]
  Integer B_stride;
  Integer rank;
  Address R;  // (rank, r) in the accumulator type, contiguous
};

struct Unit {
  Integer layer, side;
  Integer begin, end;  // positions
  Integer slot;        // covariance: client i's partial (r, r) begins at element slot + i * r * r
};

// Sections of the table, each an offset in integers.
struct Sections {
  Integer bases;    // (N) integers
  Integer layers;   // (L) LayerRow
  Integer clients;  // (N * L) ClientRow, client-major
  Integer covariance_units, apply_units;
  Integer size;
};

// One launch: the covariances of a group of layers, and the outputs of the group before it, whose
// factors are then still in the cache. Ranges of the two lists of units.
struct Launch {
  Integer covariance_begin, covariance_end, apply_begin, apply_end;
};

class Call {
 public:
  // `aggregate`: outputs are wanted, not only rotations. cache_bytes: how much of the clients'
  // factors a group of layers may hold.
  Call(const Tables& tables, Align align, bool aggregate, Integer cache_bytes);

  Sections sections;
  std::vector<Unit> covariance_units, apply_units;
  std::vector<Launch> launches;
  Integer partials = 0;   // elements of all slots
  Integer rotations = 0;  // elements of all rotations, one behind the other, client-major

  // Writes the table to `out` (sections.size integers). bases: (N). R: the address of each client's
  // rotation (N * L), see rotations_in. out_A, out_B: (L) each, or empty without `aggregate`.
  void pack(const Tables& tables, const std::vector<Address>& bases, const std::vector<Address>& R,
            const std::vector<Matrix>& out_A, const std::vector<Matrix>& out_B, Integer* out) const;

 private:
  std::vector<Integer> first_unit_, units_;  // (L)
};

// The addresses (N * L) of the rotations in one buffer of elements of `width` bytes.
std::vector<Address> rotations_in(Address buffer, Integer width, const Tables& tables);

}  // namespace fedrot::device
