// Runs the threads of a launch as fibers on one CPU thread. A few blocks are resident at a time;
// a fiber runs until it waits for others, then the schedule says who is next. Whoever may run is in
// one queue: `forward` takes from its front, `reverse` from its back, `random` from anywhere, and
// blocks start first to last, last to first or shuffled. A kernel whose result depends on the
// schedule, or that waits for what can never come, is found out by trying all three.
//
// Stricter than a GPU: all threads of a block must reach a block barrier, and all lanes of a mask a
// collective, also where some have returned. Looser: writes are visible to others at once, so a
// missing fence is not found.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

namespace cuda_host {
namespace {

enum Schedule { forward, reverse, random };
Schedule schedule = forward;
std::mt19937 generator;

constexpr int resident_blocks = 3;
constexpr std::size_t largest_shared = 227 * 1024;
cudaError_t last_error = cudaSuccess;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

struct Block;
struct Warp;

struct Lane {
  Thread index;
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned waiting_for = 0;  // mask of the collective it is in
  bool done = false;
};

struct Warp {
  Exchange shown[2][warp_size];  // one collective may begin while lanes still read the last
  int parity[warp_size] = {};
  unsigned arrived = 0;
};

struct Block {
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  int waiting = 0, running = 0;
};

struct Launch {
  const std::function<void()>* kernel;
  std::deque<Lane*> ready;
  Fiber scheduler;
  Lane* lane = nullptr;
};
Launch* active = nullptr;

void switch_to_scheduler() { switch_fiber(active->lane->fiber, active->scheduler); }

void fiber_main() {
  (*active->kernel)();
  active->lane->done = true;
  switch_to_scheduler();
  fail("a finished thread ran on");
}

void start(Block& block, unsigned index, dim3 threads, std::size_t shared_bytes) {
  block.shared.reset(new unsigned char[shared_bytes]);
  std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN: nobody may rely on zeros
  block.warps.assign((threads.x + warp_size - 1) / warp_size, Warp{});
  block.waiting = 0;
  block.running = int(threads.x);
  block.lanes.resize(threads.x);
  for (unsigned t = 0; t < threads.x; ++t) {
    auto& lane = block.lanes[t];
    if (!lane) lane = std::make_unique<Lane>();
    lane->index = {dim3(t), dim3(index), threads};
    lane->block = &block;
    lane->warp = &block.warps[t / warp_size];
    lane->waiting_for = 0;
    lane->done = false;
    prepare(lane->fiber, fiber_main);
    active->ready.push_back(lane.get());
  }
}

Lane* next() {
  auto& ready = active->ready;
  if (schedule == random) std::swap(ready.back(), ready[generator() % ready.size()]);
  Lane* lane = schedule == forward ? ready.front() : ready.back();
  if (schedule == forward)
    ready.pop_front();
  else
    ready.pop_back();
  return lane;
}

}  // namespace

const Thread& current() { return active->lane->index; }
void* shared_memory() { return active->lane->block->shared.get(); }

void yield() {
  if (schedule == forward)
    active->ready.push_back(active->lane);
  else
    active->ready.push_front(active->lane);
  switch_to_scheduler();
}

void block_barrier() {
  Block& block = *active->lane->block;
  if (++block.waiting == int(block.lanes.size())) {
    block.waiting = 0;
    for (auto& lane : block.lanes)
      if (lane.get() != active->lane) active->ready.push_back(lane.get());
    return;
  }
  switch_to_scheduler();
}

const Exchange* collective(unsigned mask, const void* bytes, std::size_t count) {
  Lane& me = *active->lane;
  const int at = lane();
  if (!(mask >> at & 1)) fail("a lane outside the mask of its collective");
  Warp& warp = *me.warp;
  const int parity = warp.parity[at];
  warp.parity[at] ^= 1;
  if (count) std::memcpy(warp.shown[parity][at].bytes, bytes, count);
  me.waiting_for = mask;
  warp.arrived |= 1u << at;
  if ((warp.arrived & mask) != mask) {
    switch_to_scheduler();
    return warp.shown[parity];
  }
  warp.arrived &= ~mask;
  const unsigned first = me.index.thread.x - at;
  for (int other = 0; other < warp_size; ++other) {
    if (!(mask >> other & 1)) continue;
    Lane* lane = me.block->lanes[first + other].get();
    if (lane->waiting_for != mask) fail("lanes disagree about the mask of a collective");
    lane->waiting_for = 0;
    if (lane != &me) active->ready.push_back(lane);
  }
  return warp.shown[parity];
}

void launch(dim3 grid, dim3 threads, std::size_t shared_bytes,
            const std::function<void()>& kernel) {
  last_error = cudaSuccess;
  if (grid.x == 0 || grid.y * grid.z != 1 || threads.x == 0 || threads.x > 1024 ||
      threads.x % warp_size || threads.y * threads.z != 1 || shared_bytes > largest_shared) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == reverse) std::reverse(order.begin(), order.end());
  if (schedule == random) std::shuffle(order.begin(), order.end(), generator);

  Launch launch{&kernel, {}, {}, nullptr};
  active = &launch;
  std::vector<Block> blocks(resident_blocks);
  std::size_t started = 0;
  for (Block& block : blocks)
    if (started < order.size()) start(block, order[started++], threads, shared_bytes);
  while (!launch.ready.empty()) {
    launch.lane = next();
    switch_fiber(launch.scheduler, launch.lane->fiber);
    if (!launch.lane->done) continue;
    Block& block = *launch.lane->block;
    if (--block.running == 0 && started < order.size())
      start(block, order[started++], threads, shared_bytes);
  }
  for (const Block& block : blocks)
    if (block.running) fail("threads wait for others that have returned or wait elsewhere");
  active = nullptr;
}

}  // namespace cuda_host

cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }

float __double2float_rz(double x) {
  const float nearest = float(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

extern "C" __attribute__((visibility("default"))) void cuda_host_schedule(int schedule,
                                                                          unsigned seed) {
  cuda_host::schedule = cuda_host::Schedule(schedule);
  cuda_host::generator.seed(seed);
}
