// A list of tensors as one run of work, so that many small tensors keep all threads as busy as one large one does.
// No containers of std here: their code, compiled for a wide machine, could stand in for the baseline's at link time.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace llmsys::cpu::LLMSYS_ISA {

// `size` uninitialised elements.
template <class T>
struct Scratch {
  T* const data;
  explicit Scratch(int64_t size) : data(new T[size]) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { delete[] data; }
  T& operator[](int64_t i) const { return data[i]; }
};

// Units of `unit` elements, numbered through the whole list; each tensor begins a new one.
template <class Tensor>
class TensorList {
 public:
  TensorList(const Tensor* tensors, int64_t num_tensors, int64_t unit)
      : tensors_(tensors), unit_(unit), starts_(num_tensors + 1), num_tensors_(num_tensors) {
    starts_[0] = 0;
    for (int64_t i = 0; i < num_tensors; ++i) starts_[i + 1] = starts_[i] + ceil_div(tensors[i].numel, unit);
  }

  int64_t units() const { return starts_[num_tensors_]; }

  // Calls body(tensor, begin, end, unit) for runs of elements that start on whole units, over as many threads as have
  // `grain` units each. `unit` is the number of the run's first.
  template <class Body>
  void for_each_run(int64_t grain, Body body) const {
    parallel_for(units(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = tensor_of(begin), unit = begin; unit < end; unit = starts_[++i]) {
        if (starts_[i] == starts_[i + 1]) continue;
        const int64_t last = (end - starts_[i]) * unit_, numel = tensors_[i].numel;
        body(tensors_[i], (unit - starts_[i]) * unit_, smaller(last, numel), unit);
      }
    });
  }

 private:
  int64_t tensor_of(int64_t unit) const {
    int64_t low = 0, high = num_tensors_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (starts_[middle] <= unit ? low : high) = middle;
    }
    return low;
  }

  const Tensor* tensors_;
  int64_t unit_;
  Scratch<int64_t> starts_;  // the first unit of each tensor, then their number
  int64_t num_tensors_;
};

}  // namespace llmsys::cpu::LLMSYS_ISA
