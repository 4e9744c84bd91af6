#include "../matmul.h"

#include "dispatch.h"
#include "gemm.h"

namespace llmsys::cpu::LLMSYS_ISA {

void matmul(const Matmul& args) {
  const Operand a = {args.a, args.dtype, args.a_row_stride, args.a_col_stride};
  const Operand b = {args.b, args.dtype, args.b_col_stride, args.b_row_stride};
  with_type(args.c_dtype, [&](auto element) {
    using T = decltype(element);
    const Store<T> store = {static_cast<T*>(args.c), args.c_stride, args.add, args.scale};
    gemm(args.rows, args.cols, args.depth, a, b, store, store.wanted());
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(matmul, Matmul)
