#include "../matmul.h"

#include "binding.h"

namespace llmsys {

namespace {

[[maybe_unused]] void bind(pybind11::module_& module, Kernel<Matmul> kernel) {
  using M = Matmul;
  define(module, "matmul", kernel, &M::a, &M::b, &M::c, &M::rows, &M::cols, &M::depth, &M::a_row_stride,
         &M::a_col_stride, &M::b_row_stride, &M::b_col_stride, &M::c_stride, &M::scale, &M::add, &M::dtype,
         &M::c_dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) { bind(module, without_stream<Matmul, cpu::matmul>); }), nullptr);

}  // namespace
}  // namespace llmsys
