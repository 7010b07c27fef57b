#include "threads.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fedrot::cpu {
namespace {

// One call of parallel_for, shared by the threads that have joined it.
struct Call {
  const int units, threads;
  const std::function<void(int, int)>& work;
  std::atomic<int> joined{0}, next{0};
  std::mutex mutex{};
  std::exception_ptr failure{};

  static void join(void* data) {
    Call& call = *static_cast<Call*>(data);
    const int thread = call.joined++;
    if (thread >= call.threads) return;
    try {
      for (int unit; (unit = call.next++) < call.units;) call.work(unit, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(call.mutex);
      call.failure = std::current_exception();
      call.next = call.units;
    }
  }
};

const pid_t loaded_in = getpid();

// PyTorch's own threads, by the entry that the OpenMP runtimes of GNU, LLVM and Intel share. After
// an operator they go on looking for work, for milliseconds, on the processors that threads of our
// own would need. Null where PyTorch has no OpenMP, and in a forked child, which has lost the
// threads that OpenMP still counts on.
using OpenMP = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
OpenMP openmp() {
  static const auto parallel = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<OpenMP>(dlsym(torch ? torch : RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return loaded_in == getpid() ? parallel : nullptr;
}

void own_threads(Call& call) {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < call.threads; ++i) others.emplace_back(&Call::join, &call);
  } catch (const std::system_error&) {  // no more threads to be had: those there do the work
  }
  Call::join(&call);
  for (std::thread& other : others) other.join();
}

}  // namespace

int worthwhile_threads(const Problem& p, int threads) {
  constexpr double per_thread = 200e3;  // operations: about 20 us
  double operations = 0;
  for (int index = 0; index < p.clients * p.layers; ++index) {
    const Layer& s = p.shapes[index % p.layers];
    const double r = s.r;
    // Covariance and average, rotation, and what the smallest of them takes.
    operations += 4 * r * r * double(s.d + s.k) + 64 * r * r * r + 10e3;
    if (operations >= per_thread * threads) return threads;
  }
  return std::max(1, int(operations / per_thread));
}

void parallel_for(int units, int threads, const std::function<void(int, int)>& work) {
  threads = std::min(threads, units);
  if (threads <= 1) {
    for (int unit = 0; unit < units; ++unit) work(unit, 0);
    return;
  }
  Call call{units, threads, work};
  // 0: all that torch.set_num_threads allows, even if some find nothing to do. GNU's runtime ends
  // the threads that a call leaves out, and PyTorch's next operator would have to make them again.
  if (const OpenMP parallel = openmp())
    parallel(&Call::join, &call, 0, 0);
  else
    own_threads(call);
  if (call.failure) std::rethrow_exception(call.failure);
}

}  // namespace fedrot::cpu
