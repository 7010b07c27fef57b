// The pointer tables of a call, owned: what a Problem points to.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "dlpack.h"
#include "problem.h"

namespace fedrot {

struct Tables {
  DType client_dtype, ref_dtype;
  std::vector<Layer> shapes;                         // (L)
  std::vector<int> ranks;                            // (N * L)
  std::vector<Matrix> lora_A, lora_B, ref_A, ref_B;  // (N * L) twice, (L) twice

  std::size_t clients() const { return lora_A.size() / shapes.size(); }
  // Moves the factors of client i by bytes[i].
  void move(const std::vector<std::int64_t>& bytes);
  // Points into these tables and into `weights` (N).
  Problem problem(const std::vector<double>& weights, double lam, Align align, bool proper) const;
};

// The tables of tensors that `show` can read, or nothing where any of them is not plainly as the
// operator wants it: what is wrong, if anything, is for `check` (checks.py) to say. Says yes
// to no call that check refuses. `head`: bytes of every Python object, before its own words.
std::optional<Tables> read(dlpack::Show show, std::size_t head, const std::vector<void*>& lora_A,
                           const std::vector<void*>& lora_B, const std::vector<void*>& ref_A,
                           const std::vector<void*>& ref_B);

}  // namespace fedrot
