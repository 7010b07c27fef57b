// Work spread over PyTorch's own threads.
#pragma once

#include <functional>

#include "../problem.h"

namespace fedrot::cpu {

// As many of `threads` as a call can keep busy for longer than it takes to wake them.
int worthwhile_threads(const Problem&, int threads);

// work(unit, thread) for 0 <= unit < units on up to `threads` threads, 0 <= thread < threads;
// returns when all are done. The calling thread takes part.
void parallel_for(int units, int threads, const std::function<void(int unit, int thread)>& work);

}  // namespace fedrot::cpu
