// How an op's functions reach Python: each bindings/<op>.cpp holds one Binding, which module.cpp finds by itself.
//
// Tensors come as addresses, sizes and strides as integers, element types as the numbers of dtype.h; the Python side
// has checked them. The interpreter lock is released while a kernel runs. Every function takes a stream first, which
// the CPU ignores.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "../dtype.h"

namespace llmsys {

template <class Args>
using Kernel = void (*)(const Args&, void* stream);

// A CPU kernel in the form that CUDA kernels have.
template <class Args, void (*run)(const Args&)>
void without_stream(const Args& args, void*) {
  run(args);
}

// What Python passes for a field: addresses and enumerations are integers.
template <class Field, class = void>
struct Passed {
  using type = Field;
};
template <class T>
struct Passed<T*> {
  using type = uintptr_t;
};
template <class Enum>
struct Passed<Enum, std::enable_if_t<std::is_enum_v<Enum>>> {
  using type = int;
};

template <class Field>
Field receive(typename Passed<Field>::type value) {
  if constexpr (std::is_pointer_v<Field>)
    return reinterpret_cast<Field>(value);
  else
    return Field(value);
}

// Defines module.name(stream, field values in this order).
template <class Args, class... Fields>
void define(pybind11::module_& module, const char* name, Kernel<Args> kernel, Fields Args::*... fields) {
  module.def(name, [=](uintptr_t stream, typename Passed<Fields>::type... values) {
    Args args{};
    ((args.*fields = receive<Fields>(values)), ...);
    pybind11::gil_scoped_release unlocked;
    kernel(args, reinterpret_cast<void*>(stream));
  });
}

struct Binding {
  using Bind = void (*)(pybind11::module_& module);
  Bind cpu, cuda;  // null where this module has no kernel for the device
  Binding* next;

  Binding(Bind cpu, Bind cuda) : cpu(cpu), cuda(cuda), next(first()) { first() = this; }

  static Binding*& first() {
    static Binding* head = nullptr;
    return head;
  }
};

}  // namespace llmsys

// Which devices this module was built for. The simulator of tests/simt builds the same bindings with LLMSYS_WITH_CPU=0.
#ifndef LLMSYS_WITH_CPU
#define LLMSYS_WITH_CPU 1
#endif
#ifndef LLMSYS_WITH_CUDA
#define LLMSYS_WITH_CUDA 0
#endif

// IF_CPU(a) is `a` in a module with CPU kernels and null in one without; IF_CUDA alike.
#if LLMSYS_WITH_CPU
#define IF_CPU(...) __VA_ARGS__
#else
#define IF_CPU(...) nullptr
#endif
#if LLMSYS_WITH_CUDA
#define IF_CUDA(...) __VA_ARGS__
#else
#define IF_CUDA(...) nullptr
#endif
