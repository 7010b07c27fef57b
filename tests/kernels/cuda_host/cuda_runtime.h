// CUDA C++ on the CPU, as much of it as csrc/cuda uses: found before the real header when a C++
// compiler builds the kernels for tests. A thread is a fiber, all fibers take turns on one CPU
// thread, and a collective (barrier, shuffle, vote) is where turns change; see emulator.cpp.
// "Device memory" is plain memory, so a memory checker sees every access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_host {

constexpr int warp_size = 32;

// What a lane shows to its warp in a collective: enough for four registers of a matrix fragment
// and as many accumulators.
struct alignas(16) Exchange {
  unsigned char bytes[64];
};

struct Thread {
  dim3 thread, block, block_dim;
};
const Thread& current();

void* shared_memory();
void block_barrier();
// Takes part in a collective of the lanes in `mask`; returns what every lane of the warp showed.
const Exchange* collective(unsigned mask, const void* bytes, std::size_t count);
void yield();  // let others run

void launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

template <class T>
T shown(const Exchange* all, int lane) {
  T value;
  std::memcpy(&value, all[lane].bytes, sizeof value);
  return value;
}

inline int lane() { return int(current().thread.x % warp_size); }

}  // namespace cuda_host

// One coordinate of the thread that asks; launches have no others.
template <dim3 cuda_host::Thread::* Of>
struct CudaHostIndex {
  struct {
    operator unsigned() const { return (cuda_host::current().*Of).x; }
  } x;
};
constexpr CudaHostIndex<&cuda_host::Thread::thread> threadIdx{};
constexpr CudaHostIndex<&cuda_host::Thread::block> blockIdx{};
constexpr CudaHostIndex<&cuda_host::Thread::block_dim> blockDim{};

inline void __syncthreads() { cuda_host::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_host::collective(mask, nullptr, 0); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { cuda_host::yield(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = cuda_host::warp_size) {
  const int base = cuda_host::lane() / width * width;
  const auto* all = cuda_host::collective(mask, &value, sizeof value);
  return cuda_host::shown<T>(all, base + source % width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const auto* all = cuda_host::collective(mask, &value, sizeof value);
  return cuda_host::shown<T>(all, cuda_host::lane() ^ bits);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const auto* all = cuda_host::collective(mask, &value, sizeof value);
  unsigned largest = 0;
  for (int lane = 0; lane < cuda_host::warp_size; ++lane) {
    const unsigned other = mask >> lane & 1 ? cuda_host::shown<unsigned>(all, lane) : 0;
    largest = other > largest ? other : largest;
  }
  return largest;
}

inline int __any_sync(unsigned mask, int value) { return __reduce_max_sync(mask, value != 0) != 0; }

inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}
inline int atomicExch(int* address, int value) {
  const int old = *address;
  *address = value;
  return old;
}
inline int atomicCAS(int* address, int expected, int value) {
  const int old = *address;
  if (old == expected) *address = value;
  return old;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

template <class To, class From>
To cuda_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
inline int __double2hiint(double x) { return int(cuda_host_bits<std::uint64_t>(x) >> 32); }
float __double2float_rz(double x);

// Host interface
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
cudaError_t cudaGetLastError();

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copy(std::forward<Arguments>(arguments)...);
  cuda_host::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                    [&] { std::apply(kernel, copy); });
  return cudaGetLastError();
}
