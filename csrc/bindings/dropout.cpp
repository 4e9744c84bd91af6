#include "../dropout.h"

#include "binding.h"

namespace llmsys {
namespace {

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using D = Dropout;
                  define(module, "dropout", Kernel<D>(without_stream<D, cpu::dropout>), &D::x, &D::y, &D::rows, &D::dim,
                         &D::x_stride, &D::seed, &D::offset, &D::threshold, &D::scale, &D::dtype);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
