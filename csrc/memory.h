// Plain memory traffic, the ceiling that bandwidth-bound ops are held against: read, write or copy with all threads,
// writing past the caches.
#pragma once

#include <cstdint>

namespace llmsys {

struct MemoryTraffic {
  const void* from;  // null: write zeros only
  void* to;          // null: read only; else aligned to 64 bytes
  int64_t bytes;     // a multiple of 65536
};

namespace cpu {
void memory_traffic(const MemoryTraffic& args);
}  // namespace cpu

}  // namespace llmsys
