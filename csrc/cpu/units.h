// The units of work that a call is cut into: whole layers, blocks of clients, ranges of positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../problem.h"
#include "kernels.h"

namespace fedrot::cpu {

// How much longer than all of them on average the busiest thread may take.
constexpr double balanced = 1.15;

// Whether threads that take one layer after the other are done at about the same time.
inline bool layers_balance(const Problem& p, int threads) {
  if (p.layers >= 8 * threads) return true;
  std::vector<std::int64_t> load(threads, 0);
  std::int64_t total = 0;
  for (int l = 0; l < p.layers; ++l) {
    const Layer s = p.shapes[l];
    const std::int64_t work = std::int64_t(s.r) * s.r * (s.d + s.k);
    *std::min_element(load.begin(), load.end()) += work;
    total += work;
  }
  return *std::max_element(load.begin(), load.end()) <= balanced * total / threads;
}

// Clients first <= i < last of a layer.
struct Clients {
  int layer, first, last;
};

// All clients of all layers in blocks, as few as keep all threads at work to the end: each block
// loads the reference of its layer.
inline std::vector<Clients> blocks_of(const Problem& p, int threads) {
  constexpr int most = 16;  // a batch of small rotations has no use for more
  const auto idle = [&](int units) {
    const int turns = (units + threads - 1) / threads;
    return turns * threads > balanced * units;
  };
  int pieces = 1;
  while (pieces < p.clients && idle(p.layers * pieces)) ++pieces;
  const int size = std::min((p.clients + pieces - 1) / pieces, most);
  std::vector<Clients> blocks;
  for (int l = 0; l < p.layers; ++l)
    for (int first = 0; first < p.clients; first += size)
      blocks.push_back({l, first, std::min(first + size, p.clients)});
  return blocks;
}

// Positions begin <= t < end of A or B.
struct Range {
  Side side;
  std::int64_t begin, end;
};

// Both factors of a layer in ranges that are short enough for every thread to get some.
inline std::vector<Range> ranges_of(const Layer& s) {
  constexpr std::int64_t length = 512;
  std::vector<Range> ranges;
  for (const Side side : {Side::A, Side::B}) {
    const std::int64_t all = side == Side::A ? s.k : s.d;
    for (std::int64_t t = 0; t < all; t += length)
      ranges.push_back({side, t, std::min(t + length, all)});
  }
  return ranges;
}

}  // namespace fedrot::cpu
