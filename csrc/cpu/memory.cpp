#include "../memory.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int64_t kBlock = 64 << 10;  // bytes a thread takes at a time: whole lines, whole vectors

template <class Body>
void for_each_block(int64_t bytes, Body body) {
  parallel_for(bytes / kBlock, 1, [&](int64_t begin, int64_t end) {
    body(begin * kBlock, (end - begin) * kBlock);
    stream_fence();
  });
}

}  // namespace

void memory_traffic(const MemoryTraffic& args) {
  const char* from = static_cast<const char*>(args.from);
  char* to = static_cast<char*>(args.to);
  for_each_block(args.bytes, [&](int64_t offset, int64_t bytes) {
    U32 sum = {};
    for (int64_t at = offset; at < offset + bytes; at += 4 * LLMSYS_VECTOR_BYTES)
      for (int i = 0; i < 4; ++i) {
        const int64_t lane = at + i * LLMSYS_VECTOR_BYTES;
        U32 value = {};
        if (from) memcpy(&value, from + lane, sizeof value);
        if (to)
          store_vector<true>(to + lane, value);
        else
          sum = sum ^ value;
      }
    if (!to) __asm__ volatile("" ::"g"(&sum) : "memory");  // the reads are wanted, their sum is not
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(memory_traffic, MemoryTraffic)
