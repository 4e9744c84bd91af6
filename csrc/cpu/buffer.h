// Memory for a kernel's own use that stays with its thread: fresh memory costs a page fault for every 4 KiB.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace llmsys::cpu::LLMSYS_ISA {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  // Room for `size` floats, aligned to a cache line. What was in it may be gone.
  float* at_least(int64_t size) {
    if (size > size_) {
      free(data_);
      size_ = size;
      data_ = static_cast<float*>(aligned_alloc(64, (size * int64_t(sizeof(float)) + 63) / 64 * 64));
      if (!data_) abort();  // as when a thread's stack cannot be had
    }
    return data_;
  }

  // Gives the memory back if it is more than `size` floats.
  void keep_at_most(int64_t size) {
    if (size_ <= size) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace llmsys::cpu::LLMSYS_ISA
