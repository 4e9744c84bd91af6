#include "dispatch.h"

#include <cstdio>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace llmsys::cpu {

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  // These builtins also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return isa == Isa::baseline || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx2 && avx512);
#else
  return isa == Isa::baseline;
#endif
}

namespace {

Isa best() {
  if (has_isa(Isa::avx512)) return Isa::avx512;
  if (has_isa(Isa::avx2)) return Isa::avx2;
  return Isa::baseline;
}

Isa chosen = best();

}  // namespace

Isa isa() { return chosen; }

void select_isa(Isa isa) { chosen = isa; }

const char* matrix_unit([[maybe_unused]] DType dtype) {
#if defined(__x86_64__)
  // By leaf 7 of cpuid: the names that compilers know are not the same from one to the next.
  unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, d1 = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &b, &c, &d1);
  const auto has = [](unsigned bits, int bit) { return (bits >> bit & 1) != 0; };
  if (!has_isa(Isa::avx512)) return nullptr;
  if (dtype == DType::bfloat16) return has(d, 22) ? "amx_bf16" : has(a1, 5) ? "avx512_bf16" : nullptr;
  if (dtype == DType::float16) return has(a1, 21) ? "amx_fp16" : has(d, 23) ? "avx512_fp16" : nullptr;
#endif
  return nullptr;
}

int64_t last_level_cache_bytes() {
  // The kernel's own table: sysconf counts every cache of an AMD package as one. Read with C's files: streams of C++
  // share their locales with whoever else in the process has them, built by another compiler or not.
  static const int64_t bytes = [] {
    int64_t largest = 0;
    for (int index = 0; index < 8; ++index) {
      char path[64];
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
      std::FILE* file = std::fopen(path, "r");
      if (!file) break;
      long kibibytes = 0;
      if (std::fscanf(file, "%ldK", &kibibytes) == 1 && kibibytes * 1024 > largest) largest = kibibytes * 1024;
      std::fclose(file);
    }
    return largest;
  }();
  return bytes;
}

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace llmsys::cpu
