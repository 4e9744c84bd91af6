#include "dispatch.h"

#include <cstdio>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace llmsys::cpu {

namespace {

// By leaf 7 of cpuid: the names that compilers know are not the same from one to the next.
struct MatrixFeatures {
  bool avx512_bf16 = false, avx512_fp16 = false, amx_bf16 = false, amx_fp16 = false;

  MatrixFeatures() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, d1 = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if (a >= 1) __get_cpuid_count(7, 1, &a1, &b, &c, &d1);
    const auto has = [](unsigned bits, int bit) { return (bits >> bit & 1) != 0; };
    avx512_bf16 = has(a1, 5), avx512_fp16 = has(d, 23), amx_bf16 = has(d, 22), amx_fp16 = has(a1, 21);
#endif
  }
};

}  // namespace

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  // These builtins also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::avx512_bf16:
      return avx512 && MatrixFeatures().avx512_bf16;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    case Isa::baseline:
      return true;
  }
#endif
  return isa == Isa::baseline;
}

namespace {

Isa best() {
  for (Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2})
    if (has_isa(isa)) return isa;
  return Isa::baseline;
}

Isa chosen = best();

}  // namespace

Isa isa() { return chosen; }

void select_isa(Isa isa) { chosen = isa; }

const char* matrix_unit(DType dtype) {
  const MatrixFeatures has;
  if (!has_isa(Isa::avx512)) return nullptr;
  if (dtype == DType::bfloat16) return has.amx_bf16 ? "amx_bf16" : nullptr;
  if (dtype == DType::float16) return has.amx_fp16 ? "amx_fp16" : has.avx512_fp16 ? "avx512_fp16" : nullptr;
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
