#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fedrot::cpu {
namespace {

// How long a thread looks before it sleeps: about what a wake-up costs, and longer than the gap
// between two passes of a call.
constexpr std::chrono::microseconds patience{50};

// Yields at every look: with more threads than processors, those with work go first.
template <class Condition>
void look_for(const Condition& condition) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!condition() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
}

class Pool {
 public:
  // A worker that wakes up late, or never gets a processor, is not waited for: the call is over
  // when nobody is at work on it.
  void run(int units, int threads, const std::function<void(int, int)>& work) {
    std::lock_guard<std::mutex> one_call_at_a_time(calls_);
    while (int(workers_.size()) < threads - 1) workers_.emplace_back([this] { serve(); });
    bool enough_awake;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = true;
      work_ = &work;
      units_ = units;
      threads_ = threads;
      joined_ = 1;
      next_ = 0;
      failure_ = nullptr;
      ++call_;
      enough_awake = int(workers_.size()) - sleeping_ >= threads - 1;
    }
    if (!enough_awake) wake_.notify_all();
    take(0);
    look_for([this] { return working_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;  // nobody joins from here on
    done_.wait(lock, [this] { return working_ == 0; });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void take(int thread) {
    try {
      for (int unit; (unit = next_.fetch_add(1)) < units_;) (*work_)(unit, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
      next_ = units_;
    }
  }

  void serve() {
    long seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      ++sleeping_;
      wake_.wait(lock, [&] { return call_ != seen; });
      --sleeping_;
      while (call_ != seen) {
        seen = call_;
        if (!open_ || joined_ == threads_) break;
        const int thread = joined_++;
        ++working_;
        lock.unlock();
        take(thread);
        lock.lock();
        if (--working_ == 0) done_.notify_one();
        lock.unlock();
        look_for([&] { return call_ != seen; });
        lock.lock();
      }
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  // Of the present call; written under mutex_, read by those who have joined it.
  bool open_ = false;
  const std::function<void(int, int)>* work_ = nullptr;
  int units_ = 0, threads_ = 0, joined_ = 0;
  std::atomic<int> next_{0};
  std::exception_ptr failure_;
  // Changed under mutex_, looked at without.
  std::atomic<long> call_{0};
  std::atomic<int> working_{0};
  int sleeping_ = 0;
};

// Never destroyed: its threads wait until the process ends. A forked child has no threads, so it
// gets a pool of its own.
Pool& pool() {
  static std::mutex guard;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(guard);
  if (owner != getpid()) {
    current = new Pool;
    owner = getpid();
  }
  return *current;
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
  pool().run(units, threads, work);
}

}  // namespace fedrot::cpu
