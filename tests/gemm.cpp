// csrc/cpu/gemm.h over arrays, for tests/test_gemm.py: compiled once per instruction set, with gemm.cpp.
#include "../csrc/cpu/gemm.h"

using namespace llmsys::cpu::LLMSYS_ISA;
using llmsys::DType;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void tile_shape(int* shape) {
  shape[0] = kTileRows;
  shape[1] = kTileCols;
}

// sizes: M, N, K; the strides of a (row, k), of b (col, k) and of c (row).
EXPORT void multiply(const int64_t* sizes, const void* a, int a_type, const void* b, int b_type, void* c, int c_type,
                     int accumulate) {
  const Operand left = {a, DType(a_type), sizes[3], sizes[4]}, right = {b, DType(b_type), sizes[5], sizes[6]};
  with_type(DType(c_type), [&](auto element) {
    using T = decltype(element);
    const Store<T> store = {static_cast<T*>(c), sizes[7], accumulate != 0};
    gemm(sizes[0], sizes[1], sizes[2], left, right, store, store.wanted());
  });
}
