#include "../sgd.h"

#include <pybind11/stl.h>

#include <vector>

#include "binding.h"

namespace llmsys {
namespace {

using Addresses = std::vector<uintptr_t>;

// sgd(stream, addresses of each list's tensors, numels, the other fields of Sgd in order); no buffers or masters: [].
[[maybe_unused]] void bind(pybind11::module_& module, Kernel<Sgd> kernel) {
  module.def("sgd", [kernel](uintptr_t stream, const Addresses& params, const Addresses& grads,
                             const Addresses& momentum_buffers, const Addresses& masters,
                             const std::vector<int64_t>& numels, double lr, double momentum, double toward_grad,
                             double weight_decay, bool nesterov, uintptr_t grad_scale, bool maximize, bool stochastic,
                             int64_t seed, int param_dtype, int grad_dtype) {
    pybind11::gil_scoped_release unlocked;
    std::vector<SgdTensor> tensors(numels.size());
    for (size_t i = 0; i < tensors.size(); ++i)
      tensors[i] = {receive<void*>(params.at(i)), receive<const void*>(grads.at(i)),
                    momentum_buffers.empty() ? nullptr : receive<float*>(momentum_buffers.at(i)),
                    masters.empty() ? nullptr : receive<float*>(masters.at(i)), numels[i]};
    kernel({tensors.data(), int64_t(tensors.size()), lr, momentum, toward_grad, weight_decay, nesterov,
            receive<const float*>(grad_scale), maximize, stochastic, seed, DType(param_dtype), DType(grad_dtype)},
           reinterpret_cast<void*>(stream));
  });
}

Binding binding(IF_CPU([](pybind11::module_& module) { bind(module, without_stream<Sgd, cpu::sgd>); }), nullptr);

}  // namespace
}  // namespace llmsys
