#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fedrot::cpu {
namespace {

class Pool {
 public:
  void run(int units, int threads, const std::function<void(int, int)>& work) {
    std::lock_guard<std::mutex> one_call_at_a_time(calls_);
    while (int(workers_.size()) < threads - 1) {
      const int index = int(workers_.size()) + 1;
      workers_.emplace_back([this, index] { serve(index); });
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      units_ = units;
      next_ = 0;
      busy_ = threads - 1;
      active_ = threads;
      failure_ = nullptr;
      ++generation_;
    }
    wake_.notify_all();
    take(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
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

  void serve(int thread) {
    long seen = 0;
    while (true) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (thread >= active_) continue;
      }
      take(thread);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int, int)>* work_ = nullptr;
  std::atomic<int> next_{0};
  int units_ = 0, busy_ = 0, active_ = 0;
  long generation_ = 0;
  std::exception_ptr failure_;
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

void parallel_for(int units, int threads, const std::function<void(int, int)>& work) {
  threads = std::min(threads, units);
  if (threads <= 1) {
    for (int unit = 0; unit < units; ++unit) work(unit, 0);
    return;
  }
  pool().run(units, threads, work);
}

}  // namespace fedrot::cpu
