// The innermost pieces of gemm.cpp: packing a panel of an operand, and multiplying two panels in registers.
#pragma once

#include <utility>

#include "gemm.h"

namespace llmsys::cpu::LLMSYS_ISA {

// ---- items: what a panel is made of, 32 bits each, and how two of them are multiplied ----

// One element, in float32.
template <class T>
struct Widened {
  using Element = T;
  static constexpr int kElements = 1;

  // kLanes items of one row; an item of each of kLanes rows; one item, cut short where K ends inside it.
  LLMSYS_INLINE static F32 along_k(const T* p) { return load(p); }
  LLMSYS_INLINE static F32 along_rows(const T* p, int64_t) { return load(p); }
  LLMSYS_INLINE static float one(const T* p, int64_t, bool) { return to_float(*p); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 of consecutive k side by side, which one instruction multiplies and adds up at twice float32's rate.
struct Paired {
  using Element = bfloat16;
  static constexpr int kElements = 2;

  LLMSYS_INLINE static F32 along_k(const bfloat16* p) { return load(reinterpret_cast<const float*>(p)); }
  LLMSYS_INLINE static F32 along_rows(const bfloat16* p, int64_t k_stride) {
    U16 low, high;
    memcpy(&low, p, sizeof low);
    memcpy(&high, p + k_stride, sizeof high);
    return as_f32(widen(low) | widen(high) << 16);
  }
  LLMSYS_INLINE static float one(const bfloat16* p, int64_t k_stride, bool whole) {
    const uint32_t bits = p->bits | (whole ? uint32_t(p[k_stride].bits) << 16 : 0u);
    float item;
    memcpy(&item, &bits, sizeof item);
    return item;
  }
};
#endif

// ---- packing: panel[i * kWidth + r] = item i of row r, zero for rows from `rows` on ----

// Which lane of (a, b) goes to lane i: the instructions that machines have, with constants for the compiler to see.
constexpr int low_ones(int i) { return (i % 2) * kLanes + i / 4 * 4 + i % 4 / 2; }  // a0 b0 a1 b1 of each four lanes
constexpr int high_ones(int i) { return low_ones(i) + 2; }                          // a2 b2 a3 b3
constexpr int low_twos(int i) { return i % 4 < 2 ? i : kLanes + i - 2; }            // a0 a1 b0 b1
constexpr int high_twos(int i) { return i % 4 < 2 ? i + 2 : kLanes + i; }           // a2 a3 b2 b3
template <int kStep>
constexpr int low_runs(int i) {  // the even runs of kStep lanes, of a and b by turns
  return i & kStep ? kLanes + (i ^ kStep) : i;
}
template <int kStep>
constexpr int high_runs(int i) {  // the odd ones
  return i & kStep ? kLanes + i : i ^ kStep;
}

template <int (*kLane)(int), int... i>
LLMSYS_INLINE F32 shuffle(F32 a, F32 b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, kLane(i)...);
}
template <int (*kLane)(int)>
LLMSYS_INLINE F32 shuffle(F32 a, F32 b) {
  return shuffle<kLane>(a, b, std::make_integer_sequence<int, kLanes>());
}

// Exchanges rows and columns in blocks of kStep x kStep.
template <int kStep>
LLMSYS_INLINE void transpose_runs(F32 (&v)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const F32 a = v[i], b = v[i + kStep];
      v[i] = shuffle<low_runs<kStep>>(a, b);
      v[i + kStep] = shuffle<high_runs<kStep>>(a, b);
    }
    transpose_runs<2 * kStep>(v);
  }
}

// Exchanges rows and columns of kLanes vectors.
LLMSYS_INLINE void transpose(F32 (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const F32 low01 = shuffle<low_ones>(v[i], v[i + 1]), high01 = shuffle<high_ones>(v[i], v[i + 1]);
    const F32 low23 = shuffle<low_ones>(v[i + 2], v[i + 3]), high23 = shuffle<high_ones>(v[i + 2], v[i + 3]);
    v[i] = shuffle<low_twos>(low01, low23);
    v[i + 1] = shuffle<high_twos>(low01, low23);
    v[i + 2] = shuffle<low_twos>(high01, high23);
    v[i + 3] = shuffle<high_twos>(high01, high23);
  }
  transpose_runs<4>(v);
}

// Any strides, from item `first` on: for what is left over.
template <int kWidth, class Item>
void pack_strided(const typename Item::Element* source, int64_t row_stride, int64_t k_stride, int rows, int64_t first,
                  int64_t depth, float* panel) {
  for (int64_t i = first; i * Item::kElements < depth; ++i)
    for (int row = 0; row < kWidth; ++row) {
      const auto* p = source + row * row_stride + i * Item::kElements * k_stride;
      panel[i * kWidth + row] = row < rows ? Item::one(p, k_stride, (i + 1) * Item::kElements <= depth) : 0.0f;
    }
}

// Rows whose elements lie side by side along k: blocks of kLanes x kLanes items are transposed in registers.
template <int kWidth, class Item>
void pack_along_k(const typename Item::Element* source, int64_t row_stride, int rows, int64_t depth, float* panel) {
  constexpr int kGroups = (kWidth + kLanes - 1) / kLanes;
  // A run of items reads whole cache lines of a group of rows before the next group's: rows that are a power of two
  // apart fall into one set of the cache, which holds few lines.
  constexpr int kLine = 64 / (Item::kElements * sizeof(typename Item::Element));
  constexpr int kRun = kLine > kLanes ? kLine : kLanes;
  const int64_t whole = depth / Item::kElements / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kRun) {
    const int64_t end = start + kRun < whole ? start + kRun : whole;
    // A vector that sticks out of the panel's width is stored before the one that belongs there: groups from the last,
    // items upwards. What sticks out at the end is overwritten by the next panel, or falls into kPanelSlack.
    for (int group = kGroups - 1; group >= 0; --group)
      for (int64_t item = start; item < end; item += kLanes) {
        F32 v[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int row = group * kLanes + i;
          v[i] = row < rows && row < kWidth ? Item::along_k(source + row * row_stride + item * Item::kElements) : F32{};
        }
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(panel + (item + i) * kWidth + group * kLanes, v[i]);
      }
  }
  pack_strided<kWidth, Item>(source, row_stride, 1, rows, whole, depth, panel);
}

// Rows that lie side by side: whole vectors are copied, where `readable` elements from each k on are the operand's.
template <int kWidth, class Item>
void pack_along_rows(const typename Item::Element* source, int64_t k_stride, int rows, int64_t readable, int64_t depth,
                     float* panel) {
  constexpr int kGroups = (kWidth + kLanes - 1) / kLanes;
  const int64_t whole = rows == kWidth && readable >= kGroups * kLanes ? depth / Item::kElements : 0;
  for (int64_t i = 0; i < whole; ++i)
    for (int group = 0; group < kGroups; ++group)
      store(panel + i * kWidth + group * kLanes,
            Item::along_rows(source + i * Item::kElements * k_stride + group * kLanes, k_stride));
  pack_strided<kWidth, Item>(source, 1, k_stride, rows, whole, depth, panel);
}

// Floats that packing may write past a panel's end.
constexpr int kPanelSlack = kLanes;

template <int kWidth, class Item>
void pack_items(const Operand& operand, int64_t num_rows, int64_t row, int64_t k, int64_t depth, float* panel) {
  const auto* source =
      static_cast<const typename Item::Element*>(operand.data) + row * operand.row_stride + k * operand.k_stride;
  const int64_t readable = num_rows - row;
  const int rows = readable < kWidth ? int(readable) : kWidth;
  if (operand.k_stride == 1)
    pack_along_k<kWidth, Item>(source, operand.row_stride, rows, depth, panel);
  else if (operand.row_stride == 1)
    pack_along_rows<kWidth, Item>(source, operand.k_stride, rows, readable, depth, panel);
  else
    pack_strided<kWidth, Item>(source, operand.row_stride, operand.k_stride, rows, 0, depth, panel);
}

// ---- multiplying ----

// Panels of single elements of any types, and panels of pairs of bfloat16.
struct Singles {
  static constexpr int kElements = 1;

  template <int kWidth>
  static void pack(const Operand& operand, int64_t num_rows, int64_t row, int64_t k, int64_t depth, float* panel) {
    with_type(operand.dtype, [&](auto element) {
      pack_items<kWidth, Widened<decltype(element)>>(operand, num_rows, row, k, depth, panel);
    });
  }
  LLMSYS_INLINE static F32 repeated(const float* item) { return splat(*item); }
  LLMSYS_INLINE static F32 add_product(F32 sum, F32 a, F32 b) { return multiply_add(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kElements = 2;

  template <int kWidth>
  static void pack(const Operand& operand, int64_t num_rows, int64_t row, int64_t k, int64_t depth, float* panel) {
    pack_items<kWidth, Paired>(operand, num_rows, row, k, depth, panel);
  }
  LLMSYS_INLINE static F32 repeated(const float* item) {
    uint32_t bits;
    memcpy(&bits, item, sizeof bits);
    return as_f32(splat(bits));
  }
  LLMSYS_INLINE static F32 add_product(F32 sum, F32 a, F32 b) { return add_products_of_pairs(sum, a, b); }
};
#endif

// One item of each row of A, which are kRowStride apart, and of B.
template <class Items, int kRowStride = 1, int kRows>
LLMSYS_INLINE void multiply_once(const float* a, const float* b, F32 (&sum)[kRows][kTileVectors]) {
  F32 right[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) right[v] = load(b + v * kLanes);
  for (int r = 0; r < kRows; ++r) {
    const F32 left = Items::repeated(a + r * kRowStride);
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Items::add_product(sum[r][v], left, right[v]);
  }
}

template <int kRows>
LLMSYS_INLINE void clear(F32 (&sum)[kRows][kTileVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = F32{};  // `= {}` would go through memory
}

template <int kRows>
LLMSYS_INLINE void put(const F32 (&sum)[kRows][kTileVectors], float* tile, bool add, int64_t tile_stride = kTileCols) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) {
      float* p = tile + r * tile_stride + v * kLanes;
      store(p, add ? load(p) + sum[r][v] : sum[r][v]);
    }
}

// tile = panel of A times panel of B, added to what the tile holds if `add`. Sums leave the registers after each `run`
// of items: the rounding errors of short runs, and of few of them, add up to less.
template <class Items, int kRows>
void multiply(int64_t items, int64_t run, const float* a, const float* b, float* tile, bool add) {
  F32 sum[kRows][kTileVectors];
  do {
    clear(sum);
    int64_t left = items < run ? items : run;
    items -= left;
    for (; left >= 8; left -= 8, a += 8 * kTileRows, b += 8 * kTileCols) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) multiply_once<Items>(a + k * kTileRows, b + k * kTileCols, sum);
    }
    for (; left > 0; --left, a += kTileRows, b += kTileCols) multiply_once<Items>(a, b, sum);
    put(sum, tile, add);
    add = true;
  } while (items > 0);
}

}  // namespace llmsys::cpu::LLMSYS_ISA
