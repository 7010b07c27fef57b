// Look-ahead into memory, in one of two ways.
//   listed    While one block of clients is computed with, the next one is fetched into the cache,
//             a little with every step of the inner loops. Hardware prefetchers do not see across
//             pages and tensors, and a burst of prefetches waits for memory just as loads do.
//   in order  A loop fetches what it reads itself a little later. A core that waits long for memory
//             has too few line buffers for a list: its prefetchers, which have more, must run
//             ahead, and they follow only what is read in order.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace fedrot {
inline namespace FEDROT_ISA {

using cpu::Ahead;

#if defined(__AMX_BF16__)
constexpr bool may_be_in_order = true;
#else
constexpr bool may_be_in_order = false;  // not tried elsewhere
#endif

inline bool is_in_order(const Ahead& ahead) { return may_be_in_order && ahead.in_order; }

// What one inner loop asks for: `step` bytes more with every advance().
struct Stream {
  const char* at;
  std::int64_t step;
};

// What is left of a segment, or the next one, spread over `iterations`.
__attribute__((noinline, cold)) inline Stream take_rest(Ahead& ahead, std::int64_t step,
                                                        std::int64_t iterations) {
  while (ahead.next != ahead.end && ahead.used >= ahead.next->bytes) ++ahead.next, ahead.used = 0;
  if (ahead.next == ahead.end) return {reinterpret_cast<const char*>(&ahead), 0};
  const std::int64_t left = ahead.next->bytes - ahead.used,
                     times = std::max<std::int64_t>(1, iterations);
  const Stream stream{ahead.next->data + ahead.used, std::min(step, (left + times - 1) / times)};
  ahead.used += stream.step * iterations;
  return stream;
}

// Bytes to ask for where so many scalar multiply-adds are done: a line of the cache at most, so
// that none is left out.
inline std::int64_t step_of(const Ahead& ahead, int multiply_adds) {
  return std::min<std::int64_t>(64, std::int64_t(ahead.bytes_per_multiply_add * multiply_adds));
}

// For a loop that calls advance() `iterations` times. It stays within one segment and should be
// short beside that.
inline Stream take_steps(Ahead& ahead, std::int64_t step, std::int64_t iterations) {
  // As take_rest() says, without a call, for which sums would leave the registers.
  if (ahead.next == ahead.end) return {reinterpret_cast<const char*>(&ahead), 0};
  if (ahead.used + step * iterations > ahead.next->bytes) return take_rest(ahead, step, iterations);
  const Stream stream{ahead.next->data + ahead.used, step};
  ahead.used += step * iterations;
  return stream;
}

// The same, once for so many scalar multiply-adds.
inline Stream take(Ahead& ahead, int multiply_adds, std::int64_t iterations) {
  return take_steps(ahead, step_of(ahead, multiply_adds), iterations);
}

inline void advance(Stream& stream) {
  __builtin_prefetch(stream.at, 0, 2);  // the second-level cache: the first is in use
  stream.at += stream.step;
}

// In order: the line so many bytes after `at`.
inline void fetch_later(const void* at) {
  constexpr std::int64_t distance = 1024;
  __builtin_prefetch(static_cast<const char*>(at) + distance);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
