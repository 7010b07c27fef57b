// The units of work that a call is cut into: whole layers, blocks of clients, ranges of positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../problem.h"
#include "kernels.h"

namespace fedrot::cpu {

// How much longer than all threads on average the busiest one works, where each takes the next unit
// when it is done with one.
inline double imbalance(const std::vector<double>& units, int threads) {
  std::vector<double> load(threads, 0);
  double total = 0;
  for (const double work : units) {
    *std::min_element(load.begin(), load.end()) += work;
    total += work;
  }
  return *std::max_element(load.begin(), load.end()) * threads / total;
}
constexpr double balanced = 1.15;

// Multiply-adds of one client for one term.
inline double work(const Layer& s) { return double(s.r) * s.r * (s.d + s.k); }

// Whether threads that take one layer after the other are done at about the same time.
inline bool layers_balance(const Problem& p, int threads) {
  if (p.layers >= 8 * threads) return true;
  std::vector<double> units;
  for (int l = 0; l < p.layers; ++l) units.push_back(work(p.shapes[l]));
  return imbalance(units, threads) <= balanced;
}

// Clients first <= i < last of a layer.
struct Clients {
  int layer, first, last;
};

// All clients of all layers in blocks, as few as keep all threads at work to the end: each block
// loads the reference of its layer.
inline std::vector<Clients> blocks_of(const Problem& p, int threads) {
  constexpr int most = 16;  // a batch of small rotations has no use for more
  const int fewest = (p.clients + most - 1) / most;
  std::vector<Clients> best;
  double least = 0;
  for (int pieces = fewest; pieces <= std::min(p.clients, fewest + 4 * threads); ++pieces) {
    std::vector<Clients> blocks;
    std::vector<double> units;
    for (int l = 0; l < p.layers; ++l)
      for (int piece = 0; piece < pieces; ++piece) {
        const int first = int(std::int64_t(p.clients) * piece / pieces);
        const int last = int(std::int64_t(p.clients) * (piece + 1) / pieces);
        blocks.push_back({l, first, last});
        units.push_back(work(p.shapes[l]) * (last - first));
      }
    const double longest = imbalance(units, threads);
    if (best.empty() || longest < least) best = std::move(blocks), least = longest;
    if (least <= balanced) break;
  }
  return best;
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
