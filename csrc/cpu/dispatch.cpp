// Chooses the instruction set once, by asking the processor. FEDROT_CPU=sse2|avx2|avx512 lowers
// the choice, for tests and comparisons.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fedrot {

#define FEDROT_DECLARE(isa)                     \
  namespace isa {                               \
  const cpu::Kernels<float>& kernels_float();   \
  const cpu::Kernels<double>& kernels_double(); \
  }
FEDROT_DECLARE(portable)
#if defined(FEDROT_X86_64)
FEDROT_DECLARE(avx2)
FEDROT_DECLARE(avx512)
#endif
#undef FEDROT_DECLARE

namespace cpu {
namespace {

[[maybe_unused]] int level() {
  static const int chosen = [] {
    int best = 0;
#if defined(FEDROT_X86_64)
    // No AVX2 processor lacks F16C, which older compilers cannot ask for.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      best = 2;
    if (const char* wanted = std::getenv("FEDROT_CPU")) {
      const int limit = !std::strcmp(wanted, "sse2") ? 0 : !std::strcmp(wanted, "avx2") ? 1 : 2;
      if (limit < best) best = limit;
    }
#endif
    return best;
  }();
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
#if defined(FEDROT_X86_64)
  if (level() == 2) return avx512::kernels_float();
  if (level() == 1) return avx2::kernels_float();
#endif
  return portable::kernels_float();
}

template <>
const Kernels<double>& kernels<double>() {
#if defined(FEDROT_X86_64)
  if (level() == 2) return avx512::kernels_double();
  if (level() == 1) return avx2::kernels_double();
#endif
  return portable::kernels_double();
}

const char* instruction_set() {
#if defined(FEDROT_X86_64)
  constexpr const char* names[] = {"sse2", "avx2", "avx512"};
  return names[level()];
#else
  return "portable";
#endif
}

}  // namespace cpu
}  // namespace fedrot
