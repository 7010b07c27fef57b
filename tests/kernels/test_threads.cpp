// What the operators cannot show of the threads: run by test_threads.py, exits 0 or says what
// failed.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/threads.h"

using fedrot::cpu::parallel_for;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

void every_unit_once() {
  for (const int threads : {1, 2, 3, 8})
    for (int call = 0; call < 500; ++call) {
      const int units = call % 50;
      std::vector<int> units_done(units, 0);
      std::vector<std::atomic<int>> inside(threads);
      std::atomic<bool> shared{false};
      parallel_for(units, threads, [&](int unit, int thread) {
        if (thread < 0 || thread >= threads || inside[thread]++ > 0) shared = true;
        ++units_done[unit];
        --inside[thread];
      });
      expect(!shared, "a thread number below `threads`, held by one thread at a time");
      for (const int done : units_done) expect(done == 1, "every unit once");
    }
}

// Whichever thread it happens in; and the next call is as if nothing had been.
void exception_reaches_the_caller() {
  const std::thread::id caller = std::this_thread::get_id();
  int seen_in_worker = 0;
  for (int call = 0; call < 2000 && seen_in_worker < 3; ++call) {
    std::string message;
    try {
      parallel_for(8, 2, [&](int, int) {
        // The caller leaves units for the worker, who throws.
        if (std::this_thread::get_id() != caller) throw std::runtime_error("worker");
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    seen_in_worker += message == "worker";
    std::atomic<int> done{0};
    parallel_for(8, 2, [&](int, int) { ++done; });
    expect(done == 8, "a whole call after an exception");
  }
  expect(seen_in_worker == 3, "an exception of a worker is thrown to the caller");
}

void several_callers() {
  std::atomic<long> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int call = 0; call < 300; ++call)
        parallel_for(7, 3, [&](int unit, int) { total += unit; });
    });
  for (std::thread& caller : callers) caller.join();
  expect(total == 4 * 300 * 21, "calls from several threads");
}

}  // namespace

int main() {
  every_unit_once();
  exception_reaches_the_caller();
  several_callers();
  return failures != 0;
}
