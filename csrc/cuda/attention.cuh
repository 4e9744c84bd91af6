// What the kernels of attention share: tiles of rows in shared memory and their products on tensor cores, the keys that
// queries see, and what becomes of scores.
//
// A block keeps a tile of kTileRows queries or keys, of which each warp takes 16 rows, and passes over tiles of the
// other side. Scores lie in registers as the sums of mma, and are from there the left operand of the next product.
// Source: Dao 2023, arXiv:2307.08691, section 3.
#pragma once

#include <algorithm>

#include "../attention.h"
#include "device.cuh"
#include "philox.cuh"

namespace llmsys::cuda::attention {

constexpr int kTileRows = 64, kWarpRows = 16;
// Used as __launch_bounds__(kThreads, 1): without the 1, ptxas 13.0 saves registers for a third block, and spills.
constexpr int kThreads = kTileRows / kWarpRows * kWarp;
constexpr float kLog2e = 1.44269504f;

// ---- tiles ----

template <class T>
using Chunk = Vector<T, kFullWidth<T>>;

// Of (tokens, columns): where a sequence of one head lies.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int tokens, columns;

  __device__ Rows(const void* all, int64_t offset, int64_t stride, int64_t tokens, int64_t columns)
      : data(static_cast<const T*>(all) + offset), stride(stride), tokens(int(tokens)), columns(int(columns)) {}

  // Whether rows are whole chunks at addresses for them.
  __device__ bool chunks() const {
    return reinterpret_cast<uintptr_t>(data) % sizeof(Chunk<T>) == 0 && (stride | columns) % kFullWidth<T> == 0;
  }
};

template <class T>
__device__ Rows<T> query_rows(const Attention& args, int b, int h) {
  return {args.q, b * args.q_batch_stride + h * args.q_head_stride, args.q_row_stride, args.queries, args.dim};
}
template <class T>
__device__ Rows<T> key_rows(const Attention& args, int b, int kv_head) {
  return {args.k, b * args.k_batch_stride + kv_head * args.k_head_stride, args.k_row_stride, args.keys, args.dim};
}
template <class T>
__device__ Rows<T> value_rows(const Attention& args, int b, int kv_head) {
  return {args.v, b * args.v_batch_stride + kv_head * args.v_head_stride, args.v_row_stride, args.keys, args.value_dim};
}
template <class T>
__device__ Rows<T> dy_rows(const Attention& args, int b, int h) {
  return {args.dy, b * args.dy_batch_stride + h * args.dy_head_stride, args.dy_row_stride, args.queries,
          args.value_dim};
}

// Rows of kDim elements in shared memory. The chunks of a row are permuted, so that those at one place of 8 rows lie in
// different banks.
template <class T, int kDim>
struct Tile {
  static constexpr int kChunks = kDim / kFullWidth<T>;
  static_assert(kChunks % 8 == 0);

  Shared<Chunk<T>> data;

  __device__ Shared<Chunk<T>> chunk(int row, int i) const { return data + (row * kChunks + (i ^ (row & 7))); }

  // Starts to copy the kRows tokens from `begin` on, by a block of kThreads; zeros where x has none.
  template <int kRows, int kThreads>
  __device__ void load(const Rows<T>& x, int begin) const {
    static_assert(kRows * kChunks % kThreads == 0);
    if (x.chunks()) {
#pragma unroll
      for (int i = 0; i < kRows * kChunks; i += kThreads) copy(x, begin, i + int(threadIdx.x));
    } else {
      for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) gather(x, begin, i / kChunks, i % kChunks);
    }
  }

  __device__ void copy(const Rows<T>& x, int begin, int i) const {
    const int row = i / kChunks, column = i % kChunks * kFullWidth<T>;
    const bool there = begin + row < x.tokens && column < x.columns;
    const T* from = x.data + (there ? (begin + row) * x.stride + column : 0);
    copy_async(chunk(row, i % kChunks), reinterpret_cast<const Chunk<T>*>(from), there);
  }

  __device__ void gather(const Rows<T>& x, int begin, int row, int i) const {
    const int column = i * kFullWidth<T>;
    Chunk<T> elements{};
    if (begin + row < x.tokens)
      for (int j = 0; j < kFullWidth<T> && column + j < x.columns; ++j)
        elements.values[j] = x.data[(begin + row) * x.stride + column + j];
    *chunk(row, i) = elements;
  }

  // As A of mma: 16 rows from `row` on, 16 columns from 16 * k on.
  __device__ void left(int row, int k, uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % kWarp;
    ldmatrix<false>(a, chunk(row + lane % 16, 2 * k + lane / 16));
  }
  // As two B, whose columns are the 16 rows from `row` on, summed over the 16 columns from 16 * k on.
  __device__ void across(int row, int k, uint32_t (&b)[4]) const {
    const int lane = threadIdx.x % kWarp;
    ldmatrix<false>(b, chunk(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  }
  // As two B, whose columns are the 16 columns from 16 * k on, summed over the 16 rows from `row` on.
  __device__ void along(int row, int k, uint32_t (&b)[4]) const {
    const int lane = threadIdx.x % kWarp;
    ldmatrix<true>(b, chunk(row + lane % 16, 2 * k + lane / 16));
  }
};

// ---- products: sums of 16 rows, as many times 8 columns as there are ----

// sums += A B^T: `left(k, a)` gives A's fragments, B is rows of a tile.
template <class T, int kDim, int kTiles, class Left>
__device__ void multiply_rows(Left left, const Tile<T, kDim>& right, float (&sums)[kTiles][4]) {
#pragma unroll(kDim <= 128 ? kDim / 16 : 4)
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    left(k, a);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      right.across(n * 8, k, b);
      mma<T>(sums[n], a, {b[0], b[1]});
      mma<T>(sums[n + 1], a, {b[2], b[3]});
    }
  }
}

// sums += A B: A is sums of an earlier product, rounded; B is rows of a tile, the columns from `column` on.
template <class T, int kDim, int kInner, int kTiles>
__device__ void multiply_columns(const float (&left)[kInner][4], const Tile<T, kDim>& right, int column,
                                 float (&sums)[kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kInner; k += 2) {
    const uint32_t a[4] = {pair_of<T>(left[k][0], left[k][1]), pair_of<T>(left[k][2], left[k][3]),
                           pair_of<T>(left[k + 1][0], left[k + 1][1]), pair_of<T>(left[k + 1][2], left[k + 1][3])};
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      right.along(k * 8, column / 16 + n / 2, b);
      mma<T>(sums[n], a, {b[0], b[1]});
      mma<T>(sums[n + 1], a, {b[2], b[3]});
    }
  }
}

// Writes a warp's sums to 16 rows `stride` apart, of which `rows` are there: rows 0 to 7 times `low`, 8 to 15 times
// `high`, the columns from `column` on.
template <class T, int kTiles>
__device__ void store_sums(T* to, int64_t stride, int rows, int columns, int column, float low, float high,
                           const float (&sums)[kTiles][4]) {
  const int lane = threadIdx.x % kWarp;
  const bool pairs = columns % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    if (row >= rows) continue;
    const float scale = half ? high : low;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int at = column + n * 8 + lane % 4 * 2;
      Vector<T, 2> pair;
      pair.set(0, sums[n][half * 2] * scale);
      pair.set(1, sums[n][half * 2 + 1] * scale);
      T* place = to + row * stride + at;
      if (pairs && at < columns) store(place, pair);
      if (!pairs && at < columns) place[0] = pair.values[0];
      if (!pairs && at + 1 < columns) place[1] = pair.values[1];
    }
  }
}

// ---- scores ----

// Whether a score is more than scale * q.k with a scale above 0.
inline bool changes_scores(const Attention& args) {
  return args.softcap != 0 || args.bias || args.alibi_slopes || args.block_mask || args.threshold != 0 ||
         !(args.scale > 0);
}

// The keys that queries see, by the table: neither `first` nor `end` ever falls.
__device__ inline int first_key(const Attention& args, int t) { return args.rows[t]; }
__device__ inline int end_key(const Attention& args, int t) { return args.rows[args.queries + t]; }

// The keys that all of the queries [begin, end) see. To be read before products: what comes after waits for memory.
struct Common {
  int first, end;

  __device__ Common(const Attention& args, int begin, int end)
      : first(first_key(args, min(end, int(args.queries)) - 1)), end(end_key(args, begin)) {}
  __device__ bool hold(int begin, int stop) const { return first <= begin && stop <= end; }
};

// Whether the block mask lets one of these queries see one of these keys. By whole warps.
__device__ inline bool let_through(const Attention& args, int b, int h, int begin, int end, int first, int stop) {
  if (!args.block_mask) return true;
  const int64_t size = args.block_size, across = ceil_div(args.keys, size);
  const uint8_t* mask = args.block_mask + b * args.mask_batch_stride + h * args.mask_head_stride;
  const int t = int(begin / size), s = int(first / size);
  const int width = int((min(int64_t(stop), args.keys) - 1) / size) - s + 1;
  const int count = (int((min(int64_t(end), args.queries) - 1) / size) - t + 1) * width;
  float found = 0.0f;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp)
    if (mask[(t + i / width) * across + s + i % width]) found = 1.0f;
  return warp_reduce(found, Larger{}) > 0.0f;
}

// The run of keys that a query sees; none, if it is not there.
struct Query {
  int t, first, end;

  __device__ Query(const Attention& args, int t) : t(t), first(0), end(0) {
    if (t >= args.queries) return;
    first = first_key(args, t);
    end = end_key(args, t);
  }
  __device__ bool sees(int s) const { return s >= first && s < end; }
};

// The random words of four keys of a query: s and its neighbours up to multiples of 4.
__device__ inline uint4 random_words(const Attention& args, int b, int h, int t, int s) {
  const uint64_t row = (uint64_t(b) * args.heads + h) * args.queries + t;
  return philox(uint64_t(args.seed), row * uint64_t(ceil_div(args.keys, 4)) + unsigned(s) / 4);
}

// Of two lanes kApart from each other: gives the lower one's `high` for the upper one's `low`.
template <int kApart>
__device__ void exchange(unsigned& low, unsigned& high) {
  const bool upper = threadIdx.x & kApart;
  const unsigned given = __shfl_xor_sync(0xffffffffu, upper ? low : high, kApart);
  (upper ? low : high) = given;
}

// The queries and keys of a thread's elements of a product with queries as rows: element i of the 8 columns from 8 * n
// on. (b, h) is the head.
struct QueryRows {
  int b, h;
  Query queries[2];
  int first_key;

  __device__ QueryRows(const Attention& args, int b, int h, int first_row)
      : b(b), h(h), queries{{args, first_row}, {args, first_row + 8}}, first_key(0) {}
  __device__ const Query& query(int, int i) const { return queries[i / 2]; }
  __device__ int key(int n, int i) const { return first_key + n * 8 + i % 2; }

  // The random words of the four elements. Two lanes have four keys of two queries: each makes those of one query.
  __device__ uint4 words(const Attention& args, int n) const {
    uint4 words = random_words(args, b, h, threadIdx.x % 2 ? queries[1].t : queries[0].t, key(n, 0));
    exchange<1>(words.x, words.z);
    exchange<1>(words.y, words.w);
    return words;
  }
};

template <int kTiles, class Visit>
__device__ void for_each(float (&values)[kTiles][4], Visit visit) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) visit(values[n][i], n, i);
}

template <class T, int kTiles, class Where>
__device__ void add_bias(const Attention& args, const Where& where, float (&scores)[kTiles][4]) {
  const T* bias = static_cast<const T*>(args.bias) + where.b * args.bias_batch_stride + where.h * args.bias_head_stride;
  for_each(scores, [&](float& z, int n, int i) {
    const int64_t t = where.query(n, i).t, s = where.key(n, i);
    if (t < args.queries && s < args.keys) z += to_float(bias[t * args.bias_row_stride + s]);
  });
}

// What q.k become: scores, -infinity where they are not seen; `slopes` are those of the softcap, if it is not null.
template <int kTiles, class Where>
__device__ void change_scores(const Attention& args, const Where& where, float (&scores)[kTiles][4],
                              float (*slopes)[4]) {
  for_each(scores, [&](float& z, int, int) { z *= args.scale; });
  if (args.softcap != 0)
    for_each(scores, [&](float& z, int n, int i) {
      const float capped = tanhf(z / args.softcap);
      z = capped * args.softcap;
      if (slopes) slopes[n][i] = 1.0f - capped * capped;
    });
  if (args.alibi_slopes)
    for_each(scores, [&](float& z, int n, int i) {
      const int64_t t = where.query(n, i).t;
      if (t >= args.queries) return;
      const int place = args.rows[2 * args.queries + t], sequence = args.rows[3 * args.queries + t];
      z -= args.alibi_slopes[int64_t(where.b + sequence) * args.heads + where.h] * float(abs(where.key(n, i) - place));
    });
  if (args.bias && args.bias_dtype == DType::float32) add_bias<float>(args, where, scores);
  if (args.bias && args.bias_dtype == DType::bfloat16) add_bias<__nv_bfloat16>(args, where, scores);
  if (args.bias && args.bias_dtype == DType::float16) add_bias<__half>(args, where, scores);
  for_each(scores, [&](float& z, int n, int i) {
    if (!where.query(n, i).sees(where.key(n, i))) z = -kInfinity;
  });
  if (args.block_mask) {
    const int64_t size = args.block_size, across = ceil_div(args.keys, size);
    const uint8_t* mask = args.block_mask + where.b * args.mask_batch_stride + where.h * args.mask_head_stride;
    for_each(scores, [&](float& z, int n, int i) {
      if (z != -kInfinity && !mask[where.query(n, i).t / size * across + where.key(n, i) / size]) z = -kInfinity;
    });
  }
}

// What the probabilities of a thread's four elements are multiplied by. By whole warps.
template <class Where>
__device__ Vector<float, 4> kept(const Attention& args, const Where& where, int n) {
  if (args.threshold == 0) return {{1.0f, 1.0f, 1.0f, 1.0f}};
  const uint4 words = where.words(args, n);
  auto factor = [&](unsigned word) { return word >= args.threshold ? args.kept_scale : 0.0f; };
  return {{factor(words.x), factor(words.y), factor(words.z), factor(words.w)}};
}

// ---- launches ----

// That many blocks; CUDA refuses more than a grid has.
inline dim3 blocks_of(int64_t count) { return dim3(unsigned(std::min(count, kMaxBlocks + 1))); }

// Calls visit(T{}, std::integral_constant<int, kDim>{}, std::bool_constant<kPlain>{}): kDim is at least both head dims.
template <class Visit>
void with_variant(const char* name, const Attention& args, Visit visit) {
  const int64_t dim = std::max(args.dim, args.value_dim);
  auto with_plain = [&](auto element, auto of_dim) {
    changes_scores(args) ? visit(element, of_dim, std::false_type{}) : visit(element, of_dim, std::true_type{});
  };
  auto with_dim = [&](auto element) {
    if (dim <= 64) return with_plain(element, std::integral_constant<int, 64>{});
    if (dim <= 128) return with_plain(element, std::integral_constant<int, 128>{});
    with_plain(element, std::integral_constant<int, 256>{});
  };
  if (dim > 256 || args.dtype == DType::float32)
    throw std::runtime_error(std::string("llmsys.cuda.") + name + ": float32 or a head dim of " + std::to_string(dim) +
                             ", expected 16-bit elements and at most 256");
  args.dtype == DType::float16 ? with_dim(__half{}) : with_dim(__nv_bfloat16{});
}

}  // namespace llmsys::cuda::attention
