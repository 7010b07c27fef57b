// Chooses the instruction set once, by asking the processor. FEDROT_CPU=sse2|avx2|avx512|amx
// lowers the choice, for tests and comparisons.
#include <cstdlib>
#include <cstring>

#if defined(FEDROT_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(FEDROT_AMX)
FEDROT_DECLARE(amx)
#endif
#undef FEDROT_DECLARE

namespace cpu {
namespace {

#if defined(FEDROT_AMX)
// Whether there is a matrix unit for bfloat16, and the kernel lets this process use it.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

[[maybe_unused]] constexpr const char* names[] = {"sse2", "avx2", "avx512", "amx"};

// The place of the instruction set in `names`.
[[maybe_unused]] int level() {
  static const int chosen = [] {
    int best = 0;
#if defined(FEDROT_X86_64)
    int limit = 3;
    if (const char* wanted = std::getenv("FEDROT_CPU"))
      for (int i = 0; i < 3; ++i)
        if (!std::strcmp(wanted, names[i])) limit = i;
    // No AVX2 processor lacks F16C, which older compilers cannot ask for.
    if (limit > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (limit > 1 && best == 1 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
      best = 2;
#if defined(FEDROT_AMX)
    if (limit > 2 && best == 2 && has_amx()) best = 3;
#endif
#endif
    return best;
  }();
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
#if defined(FEDROT_AMX)
  if (level() == 3) return amx::kernels_float();
#endif
#if defined(FEDROT_X86_64)
  if (level() == 2) return avx512::kernels_float();
  if (level() == 1) return avx2::kernels_float();
#endif
  return portable::kernels_float();
}

template <>
const Kernels<double>& kernels<double>() {
#if defined(FEDROT_AMX)
  if (level() == 3) return amx::kernels_double();
#endif
#if defined(FEDROT_X86_64)
  if (level() == 2) return avx512::kernels_double();
  if (level() == 1) return avx2::kernels_double();
#endif
  return portable::kernels_double();
}

const char* instruction_set() {
#if defined(FEDROT_X86_64)
  return names[level()];
#else
  return "portable";
#endif
}

}  // namespace cpu
}  // namespace fedrot
