#include "../grad_norm.h"

#include <pybind11/stl.h>

#include <vector>

#include "binding.h"

namespace llmsys {
namespace {

// grad_norm(stream, address, numel and element type of each tensor, address of the norm)
[[maybe_unused]] void bind(pybind11::module_& module, Kernel<GradNorm> kernel) {
  module.def("grad_norm", [kernel](uintptr_t stream, const std::vector<uintptr_t>& addresses,
                                   const std::vector<int64_t>& numels, const std::vector<int>& dtypes, uintptr_t norm) {
    pybind11::gil_scoped_release unlocked;
    std::vector<GradNormTensor> tensors(numels.size());
    for (size_t i = 0; i < tensors.size(); ++i)
      tensors[i] = {receive<const void*>(addresses.at(i)), numels[i], DType(dtypes.at(i))};
    kernel({tensors.data(), int64_t(tensors.size()), receive<float*>(norm)}, reinterpret_cast<void*>(stream));
  });
}

Binding binding(IF_CPU([](pybind11::module_& module) { bind(module, without_stream<GradNorm, cpu::grad_norm>); }),
                nullptr);

}  // namespace
}  // namespace llmsys
