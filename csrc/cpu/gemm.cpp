#include "gemm.h"

#include "../numbers.h"
#include "buffer.h"
#include "dispatch.h"
#include "gemm_panel.h"
#include "parallel.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// ---- sizes of blocks ----

// How many items of K are packed at a time: a panel of B this long fills half of a first-level cache of 32 KiB.
constexpr int64_t kMaxItems = 256;
// How many items are summed in registers, see `multiply`. Runs of 32 cost a tenth of the time, runs of 64 a thirtieth;
// where K is short, PyTorch's own sums are the most exact, and the time matters least. Without a fused multiply-add
// each product is rounded too. Pairs come from bfloat16, whose own rounding hides all that.
template <class Items>
constexpr int64_t run_of(int64_t depth) {
  if (Items::kElements > 1) return kMaxItems;
#if defined(__FMA__) || LLMSYS_AVX512
  return depth <= 512 ? 32 : 64;
#else
  return depth <= 512 ? 8 : 16;
#endif
}
// Rows of A packed at a time, for the second-level cache: 32 panels, 192 KiB on AVX2.
constexpr int64_t kMaxPanelsA = 448 / kTileRows / 2;
// Columns of B packed at a time, and sums of C kept, for the last-level cache: 2 and 4 MiB.
constexpr int64_t kMaxCols = 2048;
constexpr int64_t kMaxSums = int64_t(1) << 20;

constexpr int64_t kNearFloats = 1 << 16;

// The size of equal blocks of whole units, none over `most`, that cover `size`.
int64_t block_of(int64_t size, int64_t most, int64_t unit) {
  return size > 0 ? round_up(ceil_div(size, ceil_div(size, most)), unit) : unit;
}

// ---- memory that each thread keeps ----

struct Buffers {
  Buffer a, b, sums;
};
thread_local Buffers buffers;

// ---- tiles ----

using Multiply = void (*)(int64_t items, int64_t run, const float* a, const float* b, float* tile, bool add);

template <class Items, int... kRows>
struct MultiplyByRows {
  Multiply by_rows[sizeof...(kRows) + 1] = {nullptr, multiply<Items, kRows>...};
};
template <class Items>
#if LLMSYS_AVX512
constexpr MultiplyByRows<Items, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14> kMultiply;
#else
constexpr MultiplyByRows<Items, 1, 2, 3, 4, 5, 6> kMultiply;
#endif

// In cache lines, of which a tile's rows lie in different ones.
LLMSYS_INLINE void prefetch(const Wanted& wanted, int64_t row, int64_t col, int rows, int cols) {
  for (int r = 0; r < rows; ++r) {
    const char* p = wanted.data + (row + r) * wanted.row_bytes + col * wanted.col_bytes;
    for (int64_t at = 0; at < cols * wanted.col_bytes; at += 64) __builtin_prefetch(p + at, 1);
  }
}

// What is packed next, asked of memory a few cache lines at a time while the products before it are summed: packing
// would wait for each. Of no use for matrices in the caches, and no cost.
class Ahead {
 public:
  Ahead(const Operand& operand, int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t steps) {
    const int64_t size = operand.dtype == DType::float32 ? 4 : 2;
    const bool along_k = operand.k_stride == 1;
    at_ = static_cast<const char*>(operand.data) + (row * operand.row_stride + k * operand.k_stride) * size;
    stride_ = (along_k ? operand.row_stride : operand.k_stride) * size;
    bytes_ = (along_k ? depth : rows) * size;
    left_ = along_k ? rows : depth;
    lines_ = ceil_div(left_ * ceil_div(bytes_, 64), steps);
  }

  LLMSYS_INLINE void step() {
    for (int64_t line = 0; line < lines_ && left_ > 0; ++line) {
      __builtin_prefetch(at_ + offset_, 0, 2);
      offset_ += 64;
      if (offset_ < bytes_) continue;
      offset_ = 0;
      at_ += stride_;
      --left_;
    }
  }

 private:
  const char* at_;
  int64_t stride_, bytes_, left_, lines_, offset_ = 0;
};

// The rectangle of C that one thread computes.
struct Rectangle {
  int64_t row, row_end, col, col_end;
};

template <class Items>
void multiply_rectangle(const Gemm& args, const Rectangle& part) {
  const int64_t run = run_of<Items>(args.depth);
  const int64_t items_block = block_of(ceil_div(args.depth, Items::kElements), kMaxItems, run < 64 ? run : 16);
  const int64_t depth_block = items_block * Items::kElements;
  const bool one_pass = args.depth <= depth_block;
  // Sums that stay from one run of K to the next limit the block of C; square blocks repack least.
  const int64_t part_rows = part.row_end - part.row, part_cols = part.col_end - part.col;
  const int64_t wide = part_rows * 2 * 1024 > kMaxSums ? 1024 : kMaxCols;
  const int64_t block_cols = block_of(part_cols, one_pass ? kNearFloats / items_block : wide, kTileCols);
  const int64_t block_rows = one_pass ? round_up(part_rows, kTileRows)
                                      : block_of(part_rows, kMaxSums / block_cols / kTileRows * kTileRows, kTileRows);
  const int64_t packed_rows = one_pass ? kTileRows : block_of(block_rows, kMaxPanelsA * kTileRows, kTileRows);
  const bool b_used_once = packed_rows >= block_rows;

  const int64_t panel_a = items_block * kTileRows, panel_b = items_block * kTileCols;
  float* a = buffers.a.at_least(packed_rows * items_block + kPanelSlack);
  float* b = buffers.b.at_least((b_used_once ? 1 : block_cols / kTileCols) * panel_b + kPanelSlack);
  float* sums = one_pass ? nullptr : buffers.sums.at_least(block_rows * block_cols);
  alignas(64) float alone[kTileRows * kTileCols];

  for (int64_t col0 = part.col; col0 < part.col_end; col0 += block_cols)
    for (int64_t row0 = part.row; row0 < part.row_end; row0 += block_rows) {
      const int64_t col1 = col0 + block_cols < part.col_end ? col0 + block_cols : part.col_end;
      const int64_t row1 = row0 + block_rows < part.row_end ? row0 + block_rows : part.row_end;
      int64_t k = 0;
      do {
        const int64_t depth = k + depth_block < args.depth ? depth_block : args.depth - k;
        const bool first = k == 0, last = k + depth == args.depth;
        for (int64_t i0 = row0; i0 < row1; i0 += packed_rows) {
          const int64_t i1 = i0 + packed_rows < row1 ? i0 + packed_rows : row1;
          for (int64_t i = i0; i < i1; i += kTileRows)
            Items::template pack<kTileRows>(args.a, args.rows, i, k, depth, a + (i - i0) / kTileRows * panel_a);
          for (int64_t j = col0; j < col1; j += kTileCols) {
            // Packed when it is first needed, so that it is in the nearest cache then.
            float* right = b_used_once ? b : b + (j - col0) / kTileCols * panel_b;
            if (i0 == row0) Items::template pack<kTileCols>(args.b, args.cols, j, k, depth, right);
            const int cols = int(col1 - j < kTileCols ? col1 - j : kTileCols);
            const bool wraps = j + kTileCols >= col1;
            const int64_t next_j = wraps ? col0 : j + kTileCols, next_k = wraps ? k + depth : k;
            const int64_t next_depth = next_k + depth_block < args.depth ? depth_block : args.depth - next_k;
            Ahead ahead(args.b, next_j, col1 - next_j < kTileCols ? col1 - next_j : kTileCols, next_k,
                        i0 == row0 ? next_depth : 0, ceil_div(i1 - i0, kTileRows));
            float* tile = one_pass ? alone : sums + (j - col0) * block_rows + (i0 - row0) * kTileCols;
            for (int64_t i = i0; i < i1; i += kTileRows) {
              const int rows = int(i1 - i < kTileRows ? i1 - i : kTileRows);
              ahead.step();
              if (last && args.wanted.data) prefetch(args.wanted, i, j, rows, cols);
              kMultiply<Items>.by_rows[rows](ceil_div(depth, Items::kElements), run, a + (i - i0) / kTileRows * panel_a,
                                             right, tile, !first);
              if (last) args.finish(args.context, {tile, i, j, rows, cols});
              if (!one_pass) tile += kTileRows * kTileCols;
            }
          }
        }
        k += depth;
      } while (k < args.depth);
    }
}

auto multiply_of([[maybe_unused]] const Gemm& args) {
#if defined(__AVX512BF16__)
  if (args.a.dtype == DType::bfloat16 && args.b.dtype == DType::bfloat16) return multiply_rectangle<Pairs>;
#endif
  return multiply_rectangle<Singles>;
}

// ---- threads ----

struct Grid {
  int64_t rows, cols;
};

// How many rectangles to cut C into. The cost of one, a unit of K: the products of its tiles, and the packing of its
// share of A and B, where an element costs what about ten products do.
Grid cut(const Gemm& args, int64_t threads) {
  const int64_t row_panels = ceil_div(args.rows, kTileRows), col_panels = ceil_div(args.cols, kTileCols);
  Grid best = {1, 1};
  int64_t least = INT64_MAX;
  for (int64_t rows = 1; rows <= threads && rows <= row_panels; ++rows) {
    const int64_t cols = threads / rows < col_panels ? threads / rows : col_panels;
    const int64_t height = ceil_div(row_panels, rows) * kTileRows, width = ceil_div(col_panels, cols) * kTileCols;
    const int64_t cost = height * width + 10 * (height + width);
    if (cost < least) {
      least = cost;
      best = {rows, cols};
    }
  }
  return best;
}

}  // namespace

void gemm(const Gemm& args) {
  const auto multiply = multiply_of(args);
  if (args.rows <= 0 || args.cols <= 0) return;
  // A thread's while: waking one costs some microseconds, in which this many products are summed.
  const int64_t products = args.rows * args.cols * (args.depth > 0 ? args.depth : 1);
  const int64_t useful = ceil_div(products, int64_t(1) << 18), threads = max_threads();
  const Grid grid = cut(args, useful < threads ? useful : threads);
  const int64_t row_panels = ceil_div(args.rows, kTileRows), col_panels = ceil_div(args.cols, kTileCols);
  parallel_for(grid.rows * grid.cols, 1, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t i = cell / grid.cols, j = cell % grid.cols;
      const int64_t row_end = row_panels * (i + 1) / grid.rows * kTileRows;
      const int64_t col_end = col_panels * (j + 1) / grid.cols * kTileCols;
      multiply(args, {row_panels * i / grid.rows * kTileRows, row_end < args.rows ? row_end : args.rows,
                      col_panels * j / grid.cols * kTileCols, col_end < args.cols ? col_end : args.cols});
    }
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA
