#include "../memory.h"

#include "binding.h"

namespace llmsys {
namespace {

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using M = MemoryTraffic;
                  define<M>(module, "memory_traffic", without_stream<M, cpu::memory_traffic>, &M::from, &M::to,
                            &M::bytes);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
