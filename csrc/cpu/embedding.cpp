#include "../embedding.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <bool kStream, class T>
void copy_row(const T* from, T* to, int64_t size) {
  constexpr int64_t kStep = LLMSYS_VECTOR_BYTES / int64_t(sizeof(T));
  int64_t d = 0;
  for (; d + kStep <= size; d += kStep) {
    U32 value;
    memcpy(&value, from + d, sizeof value);
    store_vector<kStream>(to + d, value);
  }
  memcpy(to + d, from + d, (size - d) * sizeof(T));
}

template <bool kStream, class T>
void zero_row(T* to, int64_t size) {
  constexpr int64_t kStep = LLMSYS_VECTOR_BYTES / int64_t(sizeof(T));
  int64_t d = 0;
  for (; d + kStep <= size; d += kStep) store_vector<kStream>(to + d, U32{});
  memset(static_cast<void*>(to + d), 0, (size - d) * sizeof(T));
}

constexpr int64_t kTile = 2048;  // columns whose sums stay in the first cache

// to = the sum of two or more rows of dy, in order, in float32.
template <bool kStream, class T>
void sum_rows(const T* dy, int64_t dy_stride, const int64_t* positions, int64_t count, T* to, int64_t size) {
  alignas(LLMSYS_VECTOR_BYTES) float sum[kTile];
  const T* row = dy + positions[0] * dy_stride;
  for_each_pair(
      size, [&](int64_t d) { store_pair<false>(sum + d, load(row + d), load(row + d + kLanes)); },
      [&](int64_t d, int lanes) { store(sum + d, load(row + d, lanes), lanes); });
  for (int64_t n = 1; n < count - 1; ++n) {
    row = dy + positions[n] * dy_stride;
    for_each_pair(
        size,
        [&](int64_t d) {
          store_pair<false>(sum + d, load(sum + d) + load(row + d), load(sum + d + kLanes) + load(row + d + kLanes));
        },
        [&](int64_t d, int lanes) { store(sum + d, load(sum + d, lanes) + load(row + d, lanes), lanes); });
  }
  row = dy + positions[count - 1] * dy_stride;
  for_each_pair(
      size,
      [&](int64_t d) {
        store_pair<kStream>(to + d, load(sum + d) + load(row + d), load(sum + d + kLanes) + load(row + d + kLanes));
      },
      [&](int64_t d, int lanes) { store(to + d, load(sum + d, lanes) + load(row + d, lanes), lanes); });
}

// A counting sort: order[starts[id], starts[id + 1]) are the positions of `id`, in their order. Padding has none.
void sort_positions(const EmbeddingBackward& args) {
  int64_t* starts = args.starts;
  memset(starts, 0, (args.rows + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < args.count; ++i)
    if (args.ids[i] != args.padding) ++starts[args.ids[i]];
  int64_t sum = 0;
  for (int64_t id = 0; id <= args.rows; ++id) sum = starts[id] += sum;  // each the end of its own positions
  for (int64_t i = args.count - 1; i >= 0; --i)                         // filled from the end, it becomes the start
    if (args.ids[i] != args.padding) args.order[--starts[args.ids[i]]] = i;
}

// The first id with starts[id] + id >= unit.
int64_t first_id(const EmbeddingBackward& args, int64_t unit) {
  int64_t low = 0, high = args.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (args.starts[middle] + middle < unit)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <bool kStream, class T>
void forward(const EmbeddingForward& args) {
  parallel_for(args.count, grain_of(2 * args.dim * int64_t(sizeof(T))), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      copy_row<kStream>(static_cast<const T*>(args.weight) + args.ids[i] * args.weight_stride,
                        static_cast<T*>(args.y) + i * args.dim, args.dim);
    stream_fence();
  });
}

template <bool kStream, class T>
void backward(const EmbeddingBackward& args) {
  sort_positions(args);
  // A thread's share is of rows written and rows read alike, and a frequent id is shared out by columns: which thread
  // sums an element changes with their number, the order of its sum does not.
  const int64_t units = args.rows + args.count, tiles = ceil_div(args.dim, kTile);
  parallel_for(tiles * units, grain_of(args.dim * int64_t(sizeof(T))), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin / units; tile * units < end; ++tile) {
      const int64_t column = tile * kTile, size = smaller(args.dim - column, kTile);
      const int64_t first = first_id(args, begin - tile * units), last = first_id(args, end - tile * units);
      for (int64_t id = first; id < last; ++id) {
        const int64_t* positions = args.order + args.starts[id];
        const int64_t count = args.starts[id + 1] - args.starts[id];
        const T* dy = static_cast<const T*>(args.dy) + column;
        T* to = static_cast<T*>(args.dweight) + id * args.dim + column;
        if (count == 0)
          zero_row<kStream>(to, size);
        else if (count == 1)
          copy_row<kStream>(dy + positions[0] * args.dy_stride, to, size);
        else
          sum_rows<kStream>(dy, args.dy_stride, positions, count, to, size);
      }
    }
    stream_fence();
  });
}

}  // namespace

void embedding_forward(const EmbeddingForward& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    worth_streaming<T>(args.count, args.dim, args.y) ? forward<true, T>(args) : forward<false, T>(args);
  });
}

void embedding_backward(const EmbeddingBackward& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    worth_streaming<T>(args.rows, args.dim, args.dweight) ? backward<true, T>(args) : backward<false, T>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(embedding_forward, EmbeddingForward)
LLMSYS_DISPATCH(embedding_backward, EmbeddingBackward)
