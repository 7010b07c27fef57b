// Look-ahead into memory: while one block of clients is computed with, the next one is fetched into
// the cache, a little with every step of the inner loops. Hardware prefetchers do not see across
// pages and tensors, and a burst of prefetches waits for memory just as loads do.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fedrot {
inline namespace FEDROT_ISA {

using cpu::Ahead;

// What one inner loop asks for: `step` bytes more in every iteration.
struct Stream {
  const char* at;
  std::int64_t step;
};

// For a loop of `iterations` with `multiply_adds` scalar multiply-adds each.
inline Stream take(Ahead& ahead, int multiply_adds, std::int64_t iterations) {
  while (ahead.next != ahead.end && ahead.used >= ahead.next->bytes) ++ahead.next, ahead.used = 0;
  if (ahead.next == ahead.end) return {reinterpret_cast<const char*>(&ahead), 0};
  const Stream stream{ahead.next->data + ahead.used,
                      std::int64_t(ahead.bytes_per_multiply_add * multiply_adds)};
  ahead.used += stream.step * iterations;
  return stream;
}

inline void advance(Stream& stream) {
  __builtin_prefetch(stream.at, 0, 2);  // the second-level cache: the first is in use
  stream.at += stream.step;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
