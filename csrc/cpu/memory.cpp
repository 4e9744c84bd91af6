#include "../memory.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int64_t kBlock = 64 << 10;  // bytes a thread takes at a time: whole lines, whole vectors
constexpr int kUnroll = 4;

void read(const char* from, int64_t bytes) {
  U32 sums[kUnroll] = {};
  for (int64_t at = 0; at < bytes; at += kUnroll * LLMSYS_VECTOR_BYTES)
    for (int i = 0; i < kUnroll; ++i) {
      U32 value;
      memcpy(&value, from + at + i * LLMSYS_VECTOR_BYTES, sizeof value);
      sums[i] ^= value;
    }
  __asm__ volatile("" ::"g"(sums) : "memory");  // the reads are wanted, what they sum to is not
}

void write(char* to, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += LLMSYS_VECTOR_BYTES) store_vector<true>(to + at, U32{});
}

void copy(const char* from, char* to, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kUnroll * LLMSYS_VECTOR_BYTES)
    for (int i = 0; i < kUnroll; ++i) {
      U32 value;
      memcpy(&value, from + at + i * LLMSYS_VECTOR_BYTES, sizeof value);
      store_vector<true>(to + at + i * LLMSYS_VECTOR_BYTES, value);
    }
}

}  // namespace

void memory_traffic(const MemoryTraffic& args) {
  const char* from = static_cast<const char*>(args.from);
  char* to = static_cast<char*>(args.to);
  parallel_for(args.bytes / kBlock, 1, [&](int64_t begin, int64_t end) {
    const int64_t offset = begin * kBlock, bytes = (end - begin) * kBlock;
    if (from && to)
      copy(from + offset, to + offset, bytes);
    else if (from)
      read(from + offset, bytes);
    else
      write(to + offset, bytes);
    stream_fence();
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(memory_traffic, MemoryTraffic)
