// A look at the values that no kernel has read.
#pragma once

#include "../problem.h"

namespace fedrot::cpu {

// Whether the factors from which no covariance is made are finite: the reference's, and the
// clients' unless they are `averaged`.
bool unread_is_finite(const Problem&, bool averaged, int threads);

}  // namespace fedrot::cpu
