// Averages by plain multiply-adds: at each position p of one unit
//   out(p, :) = sum_i client_i(p, :) R_i          R_i (rank_i, r) carries the weight of client i
// A thread does T ranks of the output at four positions. Where a unit has fewer such tiles than the
// block threads, the clients are dealt among the rest, whose sums are added in a fixed order.
#pragma once

#include "group.cuh"
#include "table.cuh"
#include "tile.cuh"

namespace fedrot::cuda {

constexpr int block_threads = 128;

// Elements of shared memory that apply() needs.
template <int T>
constexpr int apply_scratch = block_threads / 2 * T * 4;

// o += x R: `rows` of R (rank, r) from row `q` on, columns from `column` on.
template <int T, class Acc>
__device__ __forceinline__ void rotate_tile(const Acc (&x)[T][4], const Acc* R, int rows, int r,
                                            int column, bool aligned, Acc (&o)[T][4]) {
#pragma unroll
  for (int q = 0; q < T; ++q) {
    if (q >= rows) break;
    Acc y[T];
#pragma unroll
    for (int j = 0; j < T; j += 4) {
      Acc four[4];
      load(R + q * r + column + j, clamp_to_four(r - column - j), aligned, four);
#pragma unroll
      for (int e = 0; e < 4; ++e) y[j + e] = four[e];
    }
#pragma unroll
    for (int j = 0; j < T; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) o[j][v] += x[q][v] * y[j];
  }
}

template <int T, class Client, class Acc>
__device__ __noinline__ void apply(const Call& call, Integer unit_index, Acc* scratch) {
  const Table table(call);
  const device::Unit unit = table.apply_units[unit_index];
  const device::LayerRow& layer = table.layers[unit.layer];
  const Integer count = call.clients;
  const Side side = Side(unit.side);
  const bool of_A = side == Side::columns_of_A;
  const int r = int(layer.r), quads = int(unit.end - unit.begin + 3) / 4;
  const int tiles = quads * ((r + T - 1) / T);
  int parts = 1;
  while (2 * parts * tiles <= block_threads && 2 * parts <= count) parts *= 2;
  const int part = int(threadIdx.x) / tiles;
  const Rows<void> out(of_A ? layer.out_A : layer.out_B,
                       of_A ? layer.out_A_stride : layer.out_B_stride, DType(call.ref_dtype));

  for (int tile = parts > 1 ? int(threadIdx.x) % tiles : int(threadIdx.x); tile < tiles;
       tile += block_threads) {
    const int column = tile / quads * T, quad = tile % quads;
    const Integer position = unit.begin + (of_A ? 4 * quad : quad);
    Acc o[T][4] = {};
    for (Integer i = parts > 1 ? part : 0; i < count && (parts == 1 || part < parts); i += parts) {
      const device::ClientRow row = table.clients[i * call.layers + unit.layer];
      const Rows<Client> rows(table.bases[i] + (of_A ? row.A : row.B),
                              of_A ? row.A_stride : row.B_stride, DType(call.client_dtype));
      const Rows<Acc> R(row.R, r, dtype_of<Acc>);
      const int rank = int(row.rank);
      const bool all = rows.aligned && unit.begin + 4 * quads <= unit.end;
      for (int q = 0; q < rank; q += T) {
        Acc x[T][4];
        if (all && q + T <= rank)
          load_tile<true>(rows, side, position, quads, unit.end, q, rank, x);
        else
          load_tile<false>(rows, side, position, quads, unit.end, q, rank, x);
        rotate_tile(x, reinterpret_cast<const Acc*>(R.data) + q * r, rank - q, r, column, R.aligned,
                    o);
      }
    }
    for (int from = 1; from < parts; ++from) {
      __syncthreads();
      if (part == from)
#pragma unroll
        for (int e = 0; e < T * 4; ++e) scratch[e * tiles + tile] = o[e / 4][e % 4];
      __syncthreads();
      if (part == 0)
#pragma unroll
        for (int e = 0; e < T * 4; ++e) o[e / 4][e % 4] += scratch[e * tiles + tile];
    }
    if (part == 0 || parts == 1) store_tile(out, side, position, quads, unit.end, column, r, o);
  }
}

}  // namespace fedrot::cuda
