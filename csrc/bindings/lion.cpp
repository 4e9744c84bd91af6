#include "../lion.h"

#include <pybind11/stl.h>

#include <vector>

#include "binding.h"

namespace llmsys {
namespace {

using Addresses = std::vector<uintptr_t>;

// lion(stream, addresses of each list's tensors, numels, the other fields of Lion in order); no masters: [].
[[maybe_unused]] void bind(pybind11::module_& module, Kernel<Lion> kernel) {
  module.def("lion", [kernel](uintptr_t stream, const Addresses& params, const Addresses& grads,
                              const Addresses& exp_avgs, const Addresses& masters, const std::vector<int64_t>& numels,
                              double lr, double beta1, double beta2, double weight_decay, uintptr_t grad_scale,
                              bool maximize, bool stochastic, int64_t seed, int param_dtype, int grad_dtype) {
    pybind11::gil_scoped_release unlocked;
    std::vector<LionTensor> tensors(numels.size());
    for (size_t i = 0; i < tensors.size(); ++i)
      tensors[i] = {receive<void*>(params.at(i)), receive<const void*>(grads.at(i)), receive<float*>(exp_avgs.at(i)),
                    masters.empty() ? nullptr : receive<float*>(masters.at(i)), numels[i]};
    kernel({tensors.data(), int64_t(tensors.size()), lr, beta1, beta2, weight_decay, receive<const float*>(grad_scale),
            maximize, stochastic, seed, DType(param_dtype), DType(grad_dtype)},
           reinterpret_cast<void*>(stream));
  });
}

Binding binding(IF_CPU([](pybind11::module_& module) { bind(module, without_stream<Lion, cpu::lion>); }), nullptr);

}  // namespace
}  // namespace llmsys
