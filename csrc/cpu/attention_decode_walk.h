// Which keys of a cache a call of attention_decode goes through, in which order, and where they are.
#pragma once

#include "../attention_decode.h"
#include "../numbers.h"
#include "dispatch.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

constexpr int64_t kSplitKeys = 256;  // the same whatever the number of threads
constexpr int kBlockKeys = 64;       // keys between two looks at the largest score

// What units leave behind: of each sequence, key head and split, for the rows of the head m, the sums, and the values.
struct Work : AttentionDecode {
  float* parts;
  int64_t rows, columns, max_splits;  // of a key head; of values, in whole blocks; of a sequence

  int64_t part_floats() const { return rows * (2 + columns); }
  float* part(int64_t b, int64_t head, int64_t split) const {
    return parts + ((b * kv_heads + head) * max_splits + split) * part_floats();
  }
};

// ---- which keys ----

// Of a sequence: how many keys count, and those that some of its queries see.
struct Span {
  int64_t length, first, end;
};

// The keys that query `token` sees.
inline Span seen_by(const Work& args, int64_t b, int64_t token) {
  const int64_t length = args.cache_seqlens[b], place = length - args.tokens + token;
  const int64_t first = args.window_left < 0 ? 0 : larger(0, place - args.window_left);
  const int64_t end = args.window_right < 0 ? length : smaller(length, place + args.window_right + 1);
  return {length, first, larger(first, end)};
}

// Both ends of what a query sees rise with it.
inline Span seen_by_all(const Work& args, int64_t b) {
  return {args.cache_seqlens[b], seen_by(args, b, 0).first, seen_by(args, b, args.tokens - 1).end};
}

inline int64_t first_split(const Span& span) { return span.first / kSplitKeys; }
inline int64_t end_split(const Span& span) {
  return span.end > span.first ? ceil_div(span.end, kSplitKeys) : first_split(span);
}

// A block of keys for some key heads of a sequence.
struct Step {
  int64_t b, split, head, key;
  Span span;

  int64_t split_begin() const { return larger(span.first, split * kSplitKeys); }
  int64_t split_end() const { return smaller(span.end, (split + 1) * kSplitKeys); }
  int64_t count() const { return smaller(split_end() - key, kBlockKeys); }
  bool last_of_unit() const { return key + kBlockKeys >= split_end(); }
};

// All of them, unit after unit, in the order in which threads take them.
class Walk {
 public:
  explicit Walk(const Work& args) : args_(args), heads_(args.kv_heads) {
    // Fewer heads at a time where threads would go without work. No bit depends on it.
    for (int64_t d = 1; heads_ > 1 && units() < 4 * max_threads(); ++d)
      if (args.kv_heads % d == 0) heads_ = args.kv_heads / d;
  }

  int64_t heads() const { return heads_; }

  int64_t units() const {
    int64_t units = 0;
    for (int64_t b = 0; b < args_.batch; ++b) units += units_of(seen_by_all(args_, b));
    return units;
  }

  Step start(int64_t unit) const {
    Step step = {};
    for (step.span = seen_by_all(args_, 0); unit >= units_of(step.span); step.span = seen_by_all(args_, ++step.b))
      unit -= units_of(step.span);
    const int64_t groups = args_.kv_heads / heads_;
    step.head = unit % groups * heads_;
    step.split = first_split(step.span) + unit / groups;
    step.key = step.split_begin();
    return step;
  }

  // To the next one, which there must be.
  void advance(Step& step) const {
    if (!step.last_of_unit()) {
      step.key += kBlockKeys;
      return;
    }
    step.head += heads_;
    if (step.head == args_.kv_heads) {
      step.head = 0;
      if (++step.split == end_split(step.span)) {
        do step.span = seen_by_all(args_, ++step.b);
        while (units_of(step.span) == 0);
        step.split = first_split(step.span);
      }
    }
    step.key = step.split_begin();
  }

 private:
  int64_t units_of(const Span& span) const { return (end_split(span) - first_split(span)) * (args_.kv_heads / heads_); }

  const Work& args_;
  int64_t heads_;
};

// ---- where they are ----

// The rows of the first head of a block of keys, the last one again for those after it.
template <class C>
struct KeyBlock {
  const C* k[kBlockKeys];
  const C* v[kBlockKeys];
  const float* k_scale[kBlockKeys];
  const float* v_scale[kBlockKeys];
  int8_t evenly[kBlockKeys];  // how many keys from this one on are k_token_stride apart
  int count = 0;
};

template <class C>
void find(const Work& args, const Step& step, KeyBlock<C>& block) {
  block.count = int(step.count());
  int64_t page = step.key / args.block_size, row = step.key % args.block_size;
  for (int i = 0; i < block.count; page += 1, row = 0) {
    const int64_t at = args.block_table ? args.block_table[step.b * args.table_stride + page] : step.b;
    const C* k = static_cast<const C*>(args.k) + at * args.k_block_stride + step.head * args.k_head_stride;
    const C* v = static_cast<const C*>(args.v) + at * args.v_block_stride + step.head * args.v_head_stride;
    const int64_t k_scale = at * args.k_scale_block_stride + step.head * args.k_scale_head_stride;
    const int64_t v_scale = at * args.v_scale_block_stride + step.head * args.v_scale_head_stride;
    const int end = i + int(smaller(args.block_size - row, block.count - i));
    for (; i < end; ++row, ++i) {
      block.k[i] = k + row * args.k_token_stride;
      block.v[i] = v + row * args.v_token_stride;
      block.evenly[i] = int8_t(end - i);
      if constexpr (__is_same(C, int8_t)) {
        block.k_scale[i] = args.k_scale + k_scale + row * args.k_scale_token_stride;
        block.v_scale[i] = args.v_scale + v_scale + row * args.v_scale_token_stride;
      }
    }
  }
  for (int i = block.count, last = i - 1; i < kBlockKeys; ++i) {
    block.k[i] = block.k[last];
    block.v[i] = block.v[last];
    block.evenly[i] = 1;
    if constexpr (__is_same(C, int8_t)) {
      block.k_scale[i] = block.k_scale[last];
      block.v_scale[i] = block.v_scale[last];
    }
  }
}

// ---- what is asked of memory meanwhile ----

// Cache lines, `step` bytes apart: to be asked for one at a time between computations.
struct Lines {
  const char* at;
  int64_t step;

  LLMSYS_INLINE void ask() {
    prefetch_later(at);
    at += step;
  }
};

// The rows of the block after this one, in the order in which they lie in memory, and into the second-level cache: into
// the first, requests wait for each other, and rows that are a power of two apart push each other out (Zen 4, bfloat16,
// 8 rows: 96 ns a key without or into the first, 60 into the second by heads, 31 like this; asked for in bursts, a
// fifth slower where a row or four share a key).
class Ahead {
 public:
  Ahead() = default;
  template <class C>
  Ahead(const C* const* rows, int64_t count, int64_t heads, int64_t head_stride, int64_t row_stride, int64_t dim)
      : rows_(reinterpret_cast<const char* const*>(rows)),
        count_(count),
        heads_(head_stride == dim ? 1 : heads),
        stride_(head_stride * int64_t(sizeof(C))),
        bytes_((head_stride == dim ? heads : 1) * dim * int64_t(sizeof(C))),
        by_rows_(head_stride < row_stride) {}

  // The next `lines`. Where they do not lie side by side they are asked for here, and what is left to ask costs little.
  LLMSYS_INLINE Lines take(int64_t lines) {
    const char* at = at_;
    if (end_ - at < lines * 64) return ask_now(lines);
    at_ += lines * 64;
    return {at, 64};
  }

 private:
  __attribute__((noinline)) Lines ask_now(int64_t lines) {
    for (; lines > 0 && (at_ < end_ || advance()); --lines, at_ += 64) prefetch_later(at_);
    return {reinterpret_cast<const char*>(this), 0};
  }

  // To the next rows that lie side by side, if there are any.
  bool advance() {
    if (row_ == count_ || head_ == heads_) return false;
    at_ = row();
    for (end_ = at_; row_ < count_ && head_ < heads_ && row() == end_; by_rows_ ? next_head() : next_row())
      end_ += bytes_;
    return true;
  }
  const char* row() const { return rows_[row_] + head_ * stride_; }
  void next_head() {
    if (++head_ == heads_) head_ = 0, ++row_;
  }
  void next_row() {
    if (++row_ == count_) row_ = 0, ++head_;
  }

  const char *at_ = nullptr, *end_ = nullptr;
  const char* const* rows_ = nullptr;
  int64_t count_ = 0, heads_ = 0, stride_ = 0, bytes_ = 0, row_ = 0, head_ = 0;
  bool by_rows_ = false;
};

}  // namespace llmsys::cpu::LLMSYS_ISA
