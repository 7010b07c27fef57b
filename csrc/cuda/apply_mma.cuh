// Averages of 16-bit factors by the matrix units (see apply.cuh). The rotation is the sum of two
// 16-bit parts, so nothing is lost of it that float32 outputs would show. A warp does some
// positions and Width ranks of the output; where a unit has fewer such tiles than the block warps,
// the clients are dealt among the rest, whose sums are added in a fixed order.
#pragma once

#include "apply.cuh"
#include "fragments.cuh"

namespace fedrot::cuda {

template <int Rank>
struct MmaTile {
  static constexpr int width = Rank < 64 ? Rank : 64;
  static constexpr int down = Rank < 32 ? 4 : 2;  // fragments of 16 positions
  static constexpr int positions = down * fragment, stride = width + 1;
  static constexpr int scratch = positions * stride;  // elements of shared memory of a warp
};

// tile (positions, stride) <- sum over clients first, first + step, ...
template <int Rank, class Client>
__device__ __forceinline__ void average_mma(const Call& call, const Table& table,
                                            const device::Unit& unit, int r, Integer position,
                                            int column, Integer first, Integer step, float* tile) {
  using Tile = MmaTile<Rank>;
  constexpr bool brain = dtype_of<Client> == DType::bf16;
  const Side side = Side(unit.side);
  const bool of_A = side == Side::columns_of_A;
  float sums[Tile::down][Tile::width / 8][4] = {};
  for (Integer i = first; i < call.clients; i += step) {
    const device::ClientRow& row = table.clients[i * call.layers + unit.layer];
    const Rows<Client> rows(table.bases[i] + (of_A ? row.A : row.B),
                            of_A ? row.A_stride : row.B_stride, dtype_of<Client>);
    const auto* R = reinterpret_cast<const float*>(row.R);
    const int rank = int(row.rank);
    for (int q = 0; q < rank; q += fragment) {
      std::uint32_t a[Tile::down][4];
#pragma unroll
      for (int m = 0; m < Tile::down; ++m)
        load_for_ranks(rows, side, position + m * fragment, unit.end, q, rank, a[m]);
#pragma unroll
      for (int j = 0; j < Tile::width / 8; ++j) {
        std::uint32_t high[2], low[2];
        load_rotation<Client>(R, rank, r, q, column + 8 * j, high, low);
#pragma unroll
        for (int m = 0; m < Tile::down; ++m) {
          multiply_add<brain>(sums[m][j], a[m], high);
          multiply_add<brain>(sums[m][j], a[m], low);
        }
      }
    }
  }
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int m = 0; m < Tile::down; ++m)
#pragma unroll
    for (int j = 0; j < Tile::width / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        tile[(m * fragment + position_in_order(side, e / 2, g)) * Tile::stride + 8 * j + 2 * t +
             e % 2] = sums[m][j][e];
}

// The output from `parts` tiles, `apart` elements from one to the next.
template <int Rank>
__device__ __forceinline__ void store_average(const Rows<void>& out, const device::Unit& unit,
                                              int r, Integer position, int column,
                                              const float* tile, int parts, int apart) {
  using Tile = MmaTile<Rank>;
  constexpr int quads = Tile::positions * Tile::width / 4;
  const bool of_A = unit.side == Side::columns_of_A;
  for (int quad = lane_index(); quad < quads; quad += warp_threads) {
    const int p = of_A ? quad % (Tile::positions / 4) * 4 : quad / (Tile::width / 4);
    const int q = of_A ? quad / (Tile::positions / 4) : quad % (Tile::width / 4) * 4;
    const float* from = tile + p * Tile::stride + q;
    float four[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float total = 0;
      for (int part = 0; part < parts; ++part)
        total += from[part * apart + e * (of_A ? Tile::stride : 1)];
      four[e] = total;
    }
    const Integer at = position + p;
    const int rank = column + q;
    const int count = of_A ? (rank < r ? clamp_to_four(unit.end - at) : 0)
                           : (at < unit.end ? clamp_to_four(r - rank) : 0);
    out.template with_element_type<float>([&](auto zero) {
      auto* data = reinterpret_cast<decltype(zero)*>(out.data);
      store(data + (of_A ? rank * out.stride + at : at * out.stride + rank), count, out.aligned,
            four);
    });
  }
}

template <int Rank, class Client>
__device__ __noinline__ void apply_mma(const Call& call, Integer unit_index, float* scratch) {
  using Tile = MmaTile<Rank>;
  constexpr int warps = block_threads / warp_threads;
  const Table table(call);
  const device::Unit unit = table.apply_units[unit_index];
  const device::LayerRow& layer = table.layers[unit.layer];
  const bool of_A = unit.side == Side::columns_of_A;
  const int r = int(layer.r);
  const int down = int(unit.end - unit.begin + Tile::positions - 1) / Tile::positions;
  const int tiles = down * ((r + Tile::width - 1) / Tile::width);
  int parts = 1;
  while (2 * parts * tiles <= warps && 2 * parts <= call.clients) parts *= 2;
  const Rows<void> out(of_A ? layer.out_A : layer.out_B,
                       of_A ? layer.out_A_stride : layer.out_B_stride, DType(call.ref_dtype));

  const int warp = warp_index();
  float* mine = scratch + warp * Tile::scratch;
  for (int tile = parts > 1 ? warp % tiles : warp; tile < tiles; tile += warps) {
    const Integer position = unit.begin + tile % down * Tile::positions;
    const int column = tile / down * Tile::width, part = parts > 1 ? warp / tiles : 0;
    if (part < parts)
      average_mma<Rank, Client>(call, table, unit, r, position, column, part, parts, mine);
    if (parts > 1)
      __syncthreads();
    else
      __syncwarp();
    if (part == 0)
      store_average<Rank>(out, unit, r, position, column, mine, parts, tiles * Tile::scratch);
    __syncwarp();
  }
}

}  // namespace fedrot::cuda
