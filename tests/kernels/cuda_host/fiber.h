// A function that can be left and resumed: a stack and the registers that a call must preserve.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

constexpr std::size_t stack_bytes = 128 * 1024;

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};

#if defined(__x86_64__)

// ucontext does the same, but asks the kernel for the signal mask every time.
extern "C" void cuda_host_switch(void** save, void* resume);
asm(R"(
.text
.globl cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, . - cuda_host_switch
)");

inline void prepare(Fiber& fiber, void (*function)()) {
  if (!fiber.stack) fiber.stack.reset(new unsigned char[stack_bytes]);
  auto end =
      reinterpret_cast<std::uintptr_t>(fiber.stack.get() + stack_bytes) & ~std::uintptr_t(15);
  auto* top = reinterpret_cast<void**>(end);
  *--top = nullptr;                              // a call leaves the stack 8 off 16
  *--top = reinterpret_cast<void*>(function);    // where `ret` goes
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // saved registers
  fiber.top = top;
}

inline void switch_fiber(Fiber& from, Fiber& to) { cuda_host_switch(&from.top, to.top); }

#else

inline void prepare(Fiber& fiber, void (*function)()) {
  if (!fiber.stack) fiber.stack.reset(new unsigned char[stack_bytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, function, 0);
}

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace cuda_host
