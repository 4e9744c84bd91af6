// The extension module: `cpu` and, where it was built, `cuda`, each with the functions of every op.
#include <optional>
#include <string>

#include "binding.h"

#if LLMSYS_WITH_CPU
#include "../cpu/dispatch.h"
#endif

#ifndef LLMSYS_MODULE
#define LLMSYS_MODULE _C
#endif

namespace py = pybind11;

namespace {

#if LLMSYS_WITH_CPU
using llmsys::cpu::Isa;

constexpr std::pair<const char*, Isa> kIsas[] = {
    {"baseline", Isa::baseline}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}, {"avx512_bf16", Isa::avx512_bf16}};

std::string isa_name() {
  for (auto [name, isa] : kIsas)
    if (isa == llmsys::cpu::isa()) return name;
  return "";
}

py::list available_isas() {
  py::list names;
  for (auto [name, isa] : kIsas)
    if (llmsys::cpu::has_isa(isa)) names.append(name);
  return names;
}

void select_isa(const std::string& wanted) {
  for (auto [name, isa] : kIsas)
    if (name == wanted && llmsys::cpu::has_isa(isa)) return llmsys::cpu::select_isa(isa);
  throw py::value_error("llmsys._C.cpu.select_isa: \"" + wanted + "\", expected one of " +
                        std::string(py::str(available_isas())) + ", which this machine can run");
}

void bind_cpu(py::module_ cpu) {
  cpu.def("isa", isa_name, "The instruction set in use.");
  cpu.def("isas", available_isas, "The instruction sets that this machine can run, least first.");
  cpu.def("select_isa", select_isa, "Use this instruction set from now on.");
  cpu.def("threads", llmsys::cpu::max_threads, "Threads that a kernel may use now.");
  cpu.def(
      "matrix_unit", [](int dtype) { return llmsys::cpu::matrix_unit(llmsys::DType(dtype)); },
      "The instructions that multiply matrices of this element type faster than those of matmul, or None.");
  cpu.def("last_level_cache_bytes", llmsys::cpu::last_level_cache_bytes);
}
#endif

}  // namespace

PYBIND11_MODULE(LLMSYS_MODULE, module) {
  std::optional<py::module_> cpu, cuda;
#if LLMSYS_WITH_CPU
  cpu = module.def_submodule("cpu");
  bind_cpu(*cpu);
#endif
#if LLMSYS_WITH_CUDA
  cuda = module.def_submodule("cuda");
#endif
  for (auto* binding = llmsys::Binding::first(); binding; binding = binding->next) {
    if (cpu && binding->cpu) binding->cpu(*cpu);
    if (cuda && binding->cuda) binding->cuda(*cuda);
  }
}
