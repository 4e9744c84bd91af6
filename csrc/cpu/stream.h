// When outputs are written past the caches.
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

// Output larger than half the last cache pushes out its own start before anyone reads it. Streamed, it also spares the
// read of each line that an ordinary store makes first. Needs (rows, dim) outputs whose rows all start on whole
// vectors.
template <class T, class... Outputs>
bool worth_streaming(int64_t rows, int64_t dim, const Outputs*... outputs) {
  const int64_t row_bytes = dim * int64_t(sizeof(T));
  const bool aligned = ((reinterpret_cast<uintptr_t>(outputs) % LLMSYS_VECTOR_BYTES == 0) && ...) &&
                       row_bytes % LLMSYS_VECTOR_BYTES == 0;
  const int64_t cache = last_level_cache_bytes();
  return aligned && cache > 0 && int64_t(sizeof...(outputs)) * rows * row_bytes > cache / 2;
}

}  // namespace llmsys::cpu::LLMSYS_ISA
