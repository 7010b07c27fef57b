// Memory that starts on a cache line and is not initialised: vectors that straddle two lines cost
// twice, and zeroing scratch costs as much as using it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace fedrot::cpu {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

constexpr std::size_t line = 64;  // bytes

template <class T>
std::size_t whole_lines(std::size_t count) {
  return (count * sizeof(T) + line - 1) / line * line / sizeof(T);
}

template <class T>
Buffer<T> uninitialized(std::size_t count) {
  void* p = std::aligned_alloc(line, std::max(line, whole_lines<T>(count) * sizeof(T)));
  if (!p) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

}  // namespace fedrot::cpu
