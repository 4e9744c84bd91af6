// One thread of a simulated block: its own stack, run until it suspends itself.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
// Saves this stack's registers, leaves its pointer at *from, goes on at the stack `to`. swapcontext does the same and
// two system calls: 0.4 µs instead of 4 ns.
extern "C" void simt_switch(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  Fiber() {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for the stack of a thread");
    stack_ = static_cast<std::byte*>(memory);
    mprotect(stack_, kGuardBytes, PROT_NONE);  // a stack that overflows faults
  }
  ~Fiber() { munmap(stack_, kStackBytes); }
  Fiber(const Fiber&) = delete;

  // The next resume() enters `entry`, which must never return; what the stack held is dropped.
  void reset(void (*entry)());

  // Called outside fibers: runs this one until it suspends.
  void resume();

  // Called inside this fiber: goes back to resume().
  void suspend();

 private:
  // Fault reports are made on this stack, and need far more of it than kernels do.
  static constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;

  std::byte* stack_;
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
  void *inside_ = nullptr, *outside_ = nullptr;
  void enter() { simt_switch(&outside_, inside_); }
  void leave() { simt_switch(&inside_, outside_); }
#else
  ucontext_t inside_{}, outside_{};
  void enter() { swapcontext(&outside_, &inside_); }
  void leave() { swapcontext(&inside_, &outside_); }
#endif
};

}  // namespace simt
