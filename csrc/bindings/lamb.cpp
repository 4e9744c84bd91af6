#include "../lamb.h"

#include <pybind11/stl.h>

#include <vector>

#include "binding.h"

namespace llmsys {
namespace {

using Addresses = std::vector<uintptr_t>;

// lamb(stream, addresses of each list's tensors, numels, the other fields of Lamb in order); no masters: [].
[[maybe_unused]] void bind(pybind11::module_& module, Kernel<Lamb> kernel) {
  module.def("lamb",
             [kernel](uintptr_t stream, const Addresses& params, const Addresses& grads, const Addresses& exp_avgs,
                      const Addresses& exp_avg_sqs, const Addresses& masters, const std::vector<int64_t>& numels,
                      double lr, double beta1, double beta2, double eps, double weight_decay, double bias_correction1,
                      double bias_correction2, uintptr_t grad_scale, bool maximize, bool stochastic, int64_t seed,
                      int param_dtype, int grad_dtype) {
               pybind11::gil_scoped_release unlocked;
               std::vector<LambTensor> tensors(numels.size());
               for (size_t i = 0; i < tensors.size(); ++i)
                 tensors[i] = {receive<void*>(params.at(i)),
                               receive<const void*>(grads.at(i)),
                               receive<float*>(exp_avgs.at(i)),
                               receive<float*>(exp_avg_sqs.at(i)),
                               masters.empty() ? nullptr : receive<float*>(masters.at(i)),
                               numels[i]};
               kernel({tensors.data(), int64_t(tensors.size()), lr, beta1, beta2, eps, weight_decay, bias_correction1,
                       bias_correction2, receive<const float*>(grad_scale), maximize, stochastic, seed,
                       DType(param_dtype), DType(grad_dtype)},
                      reinterpret_cast<void*>(stream));
             });
}

Binding binding(IF_CPU([](pybind11::module_& module) { bind(module, without_stream<Lamb, cpu::lamb>); }), nullptr);

}  // namespace
}  // namespace llmsys
