// One launch of a call (device.h): the covariance units of one group of layers, each with every
// client, whose last arriver per layer and client makes the rotation; and behind them, last first,
// the apply units of the group before, whose factors were read by the launch before.
#pragma once

#include "apply_mma.cuh"
#include "covariance.cuh"
#include "covariance_mma.cuh"
#include "launch.cuh"
#include "rotate.cuh"

namespace fedrot::cuda {

constexpr int block_warps = block_threads / warp_threads;

// Blocks that a multiprocessor must be able to hold, which bounds the registers of a thread: for
// small ranks many with few, else the tiles decide.
template <int Rank, class Acc>
constexpr int resident_blocks = sizeof(Acc) == sizeof(double) ? 1
                                : Rank <= 4                   ? 4
                                                              : 3;

// 16-bit clients of some rank are for the matrix units; what the reference is decides about M.
template <int Rank, class Client>
constexpr bool by_mma = Rank >= 16 && (std::is_same_v<Client, BF16> || std::is_same_v<Client, F16>);

// weights[client] / sum of all; NaN where they are not weights. By a whole group.
template <class G>
__device__ __forceinline__ double normalised_weight(const G& g, const Call& call, Integer client) {
  if (!call.weighted) return 1;
  const int count = int(call.clients);
  const double* weights = call.weights;
  if (!weights) return 1.0 / count;
  const int bad =
      g.template sum<int>(count, [=](int i) { return !(weights[i] >= 0 && weights[i] * 0 == 0); });
  const double largest = weights[g.argmax(0, count, [=](int i) { return weights[i]; })];
  if (bad || !(largest > 0)) return NAN;
  // Divided by the largest first: the sum of finite weights may overflow.
  const double total = g.template sum<double>(count, [=](int i) { return weights[i] / largest; });
  return weights[client] / largest / total;
}

// The partial sums of one layer and client are complete.
template <int Rank, class Acc, class G>
__device__ __forceinline__ void rotate(const G& g, const Call& call, const device::LayerRow& layer,
                                       const device::Unit& first_unit, const device::ClientRow& row,
                                       Integer client, Acc* scratch) {
  const int n = int(layer.r), rank = int(row.rank);
  const Integer square = layer.r * layer.r;
  const Partials<Acc> M{static_cast<const Acc*>(call.partials) + first_unit.slot + client * square,
                        call.clients * square, int(layer.units), rank, n};
  const Wanted<Acc> wanted{Acc(call.lam), call.proper != 0, Acc(normalised_weight(g, call, client)),
                           reinterpret_cast<Acc*>(row.R)};
  const Pool pool{call.workspaces, call.taken, int(call.slots),
                  workspace_elements(call.largest_rank)};
  if constexpr (Rank > warp_threads)
    rotate_by_block(M, wanted, reinterpret_cast<double*>(scratch), pool);
  else
    rotate_by_warp<Rank>(M, wanted, scratch, pool);
}

template <int Height, int Width, class Client, class Acc>
__device__ __forceinline__ void partial_covariance(const Rows<Client>& client,
                                                   const Rows<void>& ref, Side side,
                                                   const device::Unit& unit, int row, int column,
                                                   int rank, int r, Acc* partial) {
  if constexpr (by_mma<Height, Client>) {
    if (ref.dtype == client.dtype) {
      const Rows<Client> same(reinterpret_cast<Integer>(ref.data), ref.stride, ref.dtype);
      return covariance_mma<Height, Width>(client, same, side, unit.begin, unit.end, row, column,
                                           rank, r, partial);
    }
    covariance < Height, Width<16 ? Width : 16>(client, ref, side, unit.begin, unit.end, row,
                                                column, rank, r, partial);
    if constexpr (Width > 16)
      covariance<Height, 16>(client, ref, side, unit.begin, unit.end, row, column + 16, rank, r,
                             partial);
  } else {
    covariance<Height, Width>(client, ref, side, unit.begin, unit.end, row, column, rank, r,
                              partial);
  }
}

// One covariance unit with one client. Up to rank 32 that is the work of a warp, else of a block.
template <int Rank, class Client, class Acc>
__device__ __forceinline__ void covariance_of(const Call& call, const Table& table,
                                              Integer unit_index, Integer client, Acc* scratch) {
  const device::Unit unit = table.covariance_units[unit_index];
  const device::LayerRow layer = table.layers[unit.layer];
  const device::ClientRow row = table.clients[client * call.layers + unit.layer];
  const Side side = Side(unit.side);
  const bool of_A = side == Side::columns_of_A;
  const int r = int(layer.r), rank = int(row.rank);
  const Rows<Client> rows(table.bases[client] + (of_A ? row.A : row.B),
                          of_A ? row.A_stride : row.B_stride, DType(call.client_dtype));
  const Rows<void> ref(of_A ? layer.ref_A : layer.ref_B,
                       of_A ? layer.ref_A_stride : layer.ref_B_stride, DType(call.ref_dtype));
  Acc* partial = static_cast<Acc*>(call.partials) + unit.slot + client * r * r;
  int* counter = call.counters + client * call.layers + unit.layer;

  if constexpr (Rank > warp_threads) {
    // Tiles of M for the warps. The plain path has more registers to fill with less of M.
    constexpr int height = 32, width = by_mma<Rank, Client> ? 32 : 16;
    const int across = (r + width - 1) / width, tiles = (rank + height - 1) / height * across;
    for (int tile = warp_index(); tile < tiles; tile += block_warps)
      partial_covariance<height, width>(rows, ref, side, unit, tile / across * height,
                                        tile % across * width, rank, r, partial);
    __threadfence();
    __syncthreads();
    int* arrived = reinterpret_cast<int*>(scratch);
    if (threadIdx.x == 0) *arrived = atomicAdd(counter, 1);
    __syncthreads();
    const bool last = *arrived == layer.units - 1;
    __syncthreads();
    if (!last) return;
    if (threadIdx.x == 0) *counter = 0;  // for the next call
    __threadfence();
    const Block g(reinterpret_cast<double*>(scratch));
    rotate<Rank>(g, call, layer, table.covariance_units[layer.first_unit], row, client, scratch);
  } else {
    partial_covariance<Rank, Rank>(rows, ref, side, unit, 0, 0, rank, r, partial);
    __threadfence();
    __syncwarp();
    int arrived = lane_index() == 0 ? atomicAdd(counter, 1) : 0;
    arrived = __shfl_sync(whole_warp, arrived, 0);
    __syncwarp();  // a shuffle orders no memory
    if (arrived != layer.units - 1) return;
    if (lane_index() == 0) *counter = 0;
    __threadfence();
    rotate<Rank>(Warp(), call, layer, table.covariance_units[layer.first_unit], row, client,
                 scratch + warp_index() * newton_scratch(Rank));
  }
}

template <int Rank, class Client, class Acc>
__global__ void __launch_bounds__(block_threads, resident_blocks<Rank, Acc>)
    step(const __grid_constant__ Call call, const device::Launch launch,
         const Integer covariance_blocks) {
  const Table table(call);
  Acc* scratch = static_cast<Acc*>(shared_memory());
  const Integer block = blockIdx.x;
  if (block < covariance_blocks) {
    const Integer job = Rank > warp_threads ? block : block * block_warps + warp_index();
    const Integer unit = launch.covariance_begin + job / call.clients;
    if (unit < launch.covariance_end)
      covariance_of<Rank, Client>(call, table, unit, job % call.clients, scratch);
  } else {
    const Integer unit = launch.apply_end - 1 - (block - covariance_blocks);
    if constexpr (by_mma<Rank, Client>)
      apply_mma<Rank, Client>(call, unit, scratch);
    else
      apply<(Rank < 8 ? Rank : 8), Client>(call, unit, scratch);
  }
}

template <int Rank, class Client, class Acc>
const char* launch_step(const Call& call, const device::Launch& range, cudaStream_t stream) {
  const Integer pairs = (range.covariance_end - range.covariance_begin) * call.clients;
  const Integer jobs = Rank > warp_threads ? 1 : block_warps;  // of a block
  const Integer covariance_blocks = (pairs + jobs - 1) / jobs;
  const Integer blocks = covariance_blocks + range.apply_end - range.apply_begin;
  constexpr std::size_t rotation =
      Rank > warp_threads ? 64 * sizeof(double) : block_warps * newton_scratch(Rank) * sizeof(Acc);
  constexpr std::size_t average = by_mma<Rank, Client>
                                      ? block_warps * MmaTile<Rank>::scratch * sizeof(float)
                                      : apply_scratch<(Rank < 8 ? Rank : 8)> * sizeof(Acc);
  return launch(step<Rank, Client, Acc>, blocks, block_threads,
                rotation > average ? rotation : average, stream, call, range, covariance_blocks);
}

// The launch for the largest rank of the call; a layer of a smaller one leaves part of a tile
// empty.
template <class Client, class Acc>
const char* step_of(const Call& call, const device::Launch& range, cudaStream_t stream) {
  if (call.largest_rank <= 4) return launch_step<4, Client, Acc>(call, range, stream);
  if (call.largest_rank <= 8) return launch_step<8, Client, Acc>(call, range, stream);
  if (call.largest_rank <= 16) return launch_step<16, Client, Acc>(call, range, stream);
  if (call.largest_rank <= 32) return launch_step<32, Client, Acc>(call, range, stream);
  return launch_step<64, Client, Acc>(call, range, stream);
}

}  // namespace fedrot::cuda
