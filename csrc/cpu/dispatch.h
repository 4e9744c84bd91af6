// Which instruction set the CPU kernels run on: chosen once per process, the best that the machine has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace llmsys::cpu {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

Isa isa();                         // the one in use
bool has_isa(Isa isa);             // whether this machine can run it
void select_isa(Isa isa);          // for tests and LLMSYS_CPU_ISA; the caller asks has_isa first
const char* matrix_unit(DType);    // what multiplies matrices of this type faster than gemm.h does; null: nothing here
int64_t last_level_cache_bytes();  // 0 where unknown
int max_threads();                 // threads that a kernel may use now

}  // namespace llmsys::cpu

// LLMSYS_DISPATCH(name, Args) at the end of a kernel file defines cpu::name, which jumps to the chosen namespace; where
// one instruction set is all there is (LLMSYS_ISA_ALONE), to that. Of several it expands in the baseline object only,
// so that cpu::name exists once.
#if defined(LLMSYS_ISA_ALONE)
#define LLMSYS_DISPATCH(name, Args)                              \
  namespace llmsys::cpu {                                        \
  void name(const Args& args) { return LLMSYS_ISA::name(args); } \
  }
#elif !defined(LLMSYS_ISA_IS_BASELINE)
#define LLMSYS_DISPATCH(name, Args)
#else
#define LLMSYS_DISPATCH(name, Args)     \
  namespace llmsys::cpu {               \
  namespace avx2 {                      \
  void name(const Args&);               \
  }                                     \
  namespace avx512 {                    \
  void name(const Args&);               \
  }                                     \
  namespace avx512_bf16 {               \
  void name(const Args&);               \
  }                                     \
  void name(const Args& args) {         \
    switch (isa()) {                    \
      case Isa::avx512_bf16:            \
        return avx512_bf16::name(args); \
      case Isa::avx512:                 \
        return avx512::name(args);      \
      case Isa::avx2:                   \
        return avx2::name(args);        \
      case Isa::baseline:               \
        return baseline::name(args);    \
    }                                   \
  }                                     \
  }
#endif
