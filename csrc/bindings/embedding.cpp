#include "../embedding.h"

#include <string>

#include "binding.h"

namespace llmsys {
namespace {

// A kernel that raises IndexError before it would read or write outside the table.
template <class Args, void (*run)(const Args&)>
void checked(const Args& args, void*) {
  const int64_t position = first_out_of_range(args.ids, args.count, args.rows);
  if (position >= 0)
    throw pybind11::index_error("llmsys.embedding: ids has " + std::to_string(args.ids[position]) + " at position " +
                                std::to_string(position) + ", expected numbers in [0, " + std::to_string(args.rows) +
                                ")");
  run(args);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using F = EmbeddingForward;
                  define(module, "embedding_forward", Kernel<F>(checked<F, cpu::embedding_forward>), &F::ids,
                         &F::weight, &F::y, &F::count, &F::rows, &F::dim, &F::weight_stride, &F::dtype);
                  using B = EmbeddingBackward;
                  define(module, "embedding_backward", Kernel<B>(checked<B, cpu::embedding_backward>), &B::ids, &B::dy,
                         &B::dweight, &B::starts, &B::order, &B::count, &B::rows, &B::dim, &B::dy_stride, &B::padding,
                         &B::dtype);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
