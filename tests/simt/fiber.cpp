#include "fiber.h"

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {

// AddressSanitizer must be told of each switch of stacks. The stack outside fibers is learnt on the way in.
#if defined(__SANITIZE_ADDRESS__)
const void* outside_bottom;
size_t outside_bytes;

void announce(void** fake_stack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
void arrived_inside(void* fake_stack) { __sanitizer_finish_switch_fiber(fake_stack, &outside_bottom, &outside_bytes); }
void arrived_outside(void* fake_stack) { __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr); }
#else
constexpr const void* outside_bottom = nullptr;
constexpr size_t outside_bytes = 0;

void announce(void**, const void*, size_t) {}
void arrived_inside(void*) {}
void arrived_outside(void*) {}
#endif

void (*entry_of_reset)();

void enter_first() {
  arrived_inside(nullptr);
  entry_of_reset();
}

}  // namespace

void Fiber::reset(void (*entry)()) {
  entry_of_reset = entry;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_ + kGuardBytes, kStackBytes - kGuardBytes);
#endif
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
  // As simt_switch leaves a stack: six registers, then where to return; a null return address above ends stack traces.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  for (void** slot = top - 8; slot < top; ++slot) *slot = nullptr;
  top[-2] = reinterpret_cast<void*>(enter_first);
  inside_ = top - 8;
#else
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = nullptr;
  makecontext(&inside_, enter_first, 0);
#endif
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  announce(&fake_stack, stack_, kStackBytes);
  enter();
  arrived_outside(fake_stack);
}

void Fiber::suspend() {
  void* fake_stack = nullptr;
  announce(&fake_stack, outside_bottom, outside_bytes);
  leave();
  arrived_inside(fake_stack);
}

}  // namespace simt
