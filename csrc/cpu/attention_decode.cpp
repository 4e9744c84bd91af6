// A unit of work is a split of one sequence's keys, with some of the key heads: it goes through the keys once, block by
// block, whose heads are neighbours in memory, and the query rows of a head share each read of k and v. Units leave the
// sum of e^(z - m) v, m and the sum of e^(z - m) of each row behind; then they are merged.
#include "../attention_decode.h"

#include <utility>

#include "attention_decode_products.h"
#include "attention_decode_walk.h"
#include "buffer.h"
#include "dispatch.h"
#include "functions.h"
#include "parallel.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int64_t kKeptFloats = int64_t(1) << 22;          // of parts, from call to call
constexpr int kMaxRows = kLanes / 2 < 8 ? kLanes / 2 : 8;  // that are scored side by side

// What scores are shifted by: e^infinity, not NaN, is what becomes of an infinite one.
LLMSYS_INLINE F32 finite_or_zero(F32 x) { return select((x < kInfinity) & (x > -kInfinity), x, F32{}); }

// What is known of the rows of a panel, in each of their lanes.
struct Panel {
  F32 largest, total;  // so far: the largest score, and the sum of e^(z - largest) in each lane
  F32 slope;
  I32 first, end;  // keys that the row sees
  I32 place;
};

template <class Items, class C, int kRows>
class Worker {
  using S = Side<kRows, Items::kElements>;

 public:
  Worker(const Work& args, int64_t heads)
      : args_(args), heads_(heads), runs_(ceil_div(args.rows, kRows)), products_(args, heads) {
    static thread_local Buffer panels;
    panels_ = reinterpret_cast<Panel*>(panels.at_least(heads * runs_ * S::kPanels * int64_t(sizeof(Panel) / 4)));
    for (int lane = 0; lane < kLanes; ++lane) key_of_lane_[lane] = lane % S::kRun;
  }

  void begin(const Step& step) {
    first_of_last_ = seen_by(args_, step.b, args_.tokens - 1).first;
    end_of_first_ = smaller(seen_by(args_, step.b, 0).end, step.split_end());
    split_end_ = step.split_end();
    if (b_ != step.b || head_ != step.head) take_queries(step);
    b_ = step.b, head_ = step.head;
    for (int64_t i = 0; i < heads_ * runs_ * S::kPanels; ++i)
      panels_[i].largest = splat(-kInfinity), panels_[i].total = F32{};
    for (int64_t head = 0; head < heads_; ++head)
      memset(values_of(step, head), 0, args_.rows * args_.columns * sizeof(float));
  }

  void add(const Step& step, const KeyBlock<C>& block, const KeyBlock<C>* next) {
    const int keys = int(ceil_div(block.count, S::kStep)) * S::kStep;
    Ahead ahead_k, ahead_v;
    if (next) {
      ahead_k = {next->k, next->count, heads_, args_.k_head_stride, args_.k_token_stride, args_.dim};
      ahead_v = {next->v, next->count, heads_, args_.v_head_stride, args_.v_token_stride, args_.value_dim};
    }
    for (int64_t head = 0; head < heads_; ++head) {
      if constexpr (__is_same(C, int8_t))
        for (int i = 0; i < keys; ++i) {
          k_scale_[i] = block.k_scale[i][head * args_.k_scale_head_stride];
          v_scale_[i] = block.v_scale[i][head * args_.v_scale_head_stride];
        }
      for (int64_t run = 0; run < runs_; ++run) {
        F32 scores[S::kPanels][S::kVectors];
        float factors[kRows];
        products_.score(block, head, run, keys, scores, ahead_k);
        for (int p = 0; p < S::kPanels; ++p) {
          finish(step, panels(head, run)[p], keys / S::kRun, scores[p]);
          weigh(panels(head, run)[p], keys / S::kRun, scores[p], factors + p * S::kPanelRows);
          products_.take_weights(p, keys / S::kRun, scores[p]);
        }
        products_.add_values(block, head, run, keys, smaller(kRows, args_.rows - run * kRows), factors,
                             values_of(step, head) + run * kRows * args_.columns, ahead_v);
      }
    }
  }

  // What merge_row reads of each row besides its values: m, and the sum.
  void end(const Step& step) {
    for (int64_t head = 0; head < heads_; ++head) {
      float* part = part_of(step, head);
      for (int64_t row = 0; row < args_.rows; ++row) {
        const int64_t in_run = row % kRows;
        const Panel& panel = panels(head, row / kRows)[in_run / S::kPanelRows];
        const int lane = int(in_run % S::kPanelRows) * S::kRun;
        part[row] = panel.largest[lane];
        part[args_.rows + row] = over_runs<S::kRun>(panel.total, [](F32 a, F32 b) { return a + b; })[lane];
      }
    }
  }

 private:
  float* part_of(const Step& step, int64_t head) const { return args_.part(step.b, step.head + head, step.split); }
  float* values_of(const Step& step, int64_t head) const { return part_of(step, head) + 2 * args_.rows; }
  Panel* panels(int64_t head, int64_t run) const { return panels_ + (head * runs_ + run) * S::kPanels; }

  // Of all rows of the step's heads. Beyond the last one, that again.
  void take_queries(const Step& step) {
    alignas(64) float rows[kRows][kMaxDim];
    const int64_t group = args_.heads / args_.kv_heads;
    for (int64_t head = 0; head < heads_; ++head)
      for (int64_t run = 0; run < runs_; ++run) {
        const int64_t count = smaller(kRows, args_.rows - run * kRows);
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t row = run * kRows + smaller(r, count - 1), token = row % args_.tokens;
          const int64_t h = (step.head + head) * group + row / args_.tokens;
          if (r < count) load_query(step.b, token, h, rows[r]);
          const Span span = seen_by(args_, step.b, token);
          Panel& panel = panels(head, run)[r / S::kPanelRows];
          for (int lane = int(r % S::kPanelRows) * S::kRun, end = lane + S::kRun; lane < end; ++lane) {
            panel.first[lane] = int32_t(span.first);
            panel.end[lane] = int32_t(span.end);
            panel.place[lane] = int32_t(span.length - args_.tokens + token);
            panel.slope[lane] = args_.alibi_slopes ? args_.alibi_slopes[step.b * args_.alibi_stride + h] : 0.0f;
          }
        }
        products_.take_queries(head, run, rows, count);
      }
  }

  void load_query(int64_t b, int64_t token, int64_t h, float* to) const {
    with_type(args_.dtype, [&](auto element) {
      const auto* q = static_cast<const decltype(element)*>(args_.q) + b * args_.q_batch_stride +
                      token * args_.q_token_stride + h * args_.q_head_stride;
      for (int64_t d = 0; d < args_.dim; d += kLanes) {
        const int count = int(smaller(kLanes, args_.dim - d));
        store(to + d, count == kLanes ? load(q + d) : load(q + d, count));
      }
    });
  }

  // From products to what the softmax is of.
  LLMSYS_INLINE void finish(const Step& step, const Panel& panel, int vectors, F32* scores) {
    const bool all_seen = step.key >= first_of_last_ && step.key + vectors * S::kRun <= end_of_first_;
    for (int i = 0; i < vectors; ++i) {
      F32 z = scores[i] * args_.scale;
      if constexpr (__is_same(C, int8_t)) z = z * repeated<S::kRun>(k_scale_ + i * S::kRun);
      if (args_.softcap) z = args_.softcap * tanh(z / args_.softcap);
      const I32 key = key_of_lane_ + int32_t(step.key + i * S::kRun);
      if (args_.alibi_slopes) {
        const F32 distance = __builtin_convertvector(panel.place - key, F32);
        z = z - panel.slope * max(distance, -distance);
      }
      if (!all_seen)
        z = select((key >= panel.first) & (key < panel.end) & (key < int32_t(split_end_)), z, splat(-kInfinity));
      scores[i] = z;
    }
  }

  // From scores to probabilities, times the scales of values, and what the sums from before are multiplied with.
  LLMSYS_INLINE void weigh(Panel& panel, int vectors, F32* scores, float* factors) const {
    F32 largest = panel.largest;
    for (int i = 0; i < vectors; ++i) largest = max(scores[i], largest);
    largest = over_runs<S::kRun>(largest, [](F32 a, F32 b) { return max(a, b); });
    const F32 shift = finite_or_zero(largest), factor = exp(panel.largest - shift);
    F32 total = panel.total * factor;
    for (int i = 0; i < vectors; i += 2) {
      Block weight = exp(Block{scores[i] - shift, scores[i + 1] - shift});
      total = total + (weight.first + weight.second);
      if constexpr (__is_same(C, int8_t)) {
        weight.first = weight.first * repeated<S::kRun>(v_scale_ + i * S::kRun);
        weight.second = weight.second * repeated<S::kRun>(v_scale_ + (i + 1) * S::kRun);
      }
      scores[i] = weight.first, scores[i + 1] = weight.second;
    }
    panel.total = total, panel.largest = largest;
    for (int r = 0; r < S::kPanelRows; ++r) factors[r] = factor[r * S::kRun];
  }

  const Work& args_;
  const int64_t heads_, runs_;
  int64_t b_ = -1, head_ = -1;  // of the queries taken
  int64_t first_of_last_ = 0, end_of_first_ = 0, split_end_ = 0;
  Panel* panels_;
  I32 key_of_lane_ = {};
  float k_scale_[kBlockKeys], v_scale_[kBlockKeys];
  Products<Items, C, kRows> products_;
};

template <class Items, class C, int kRows>
void run_units(const Work& args) {
  const Walk walk(args);
  parallel_for(walk.units(), 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    Worker<Items, C, kRows> worker(args, walk.heads());
    KeyBlock<C> blocks[2];
    KeyBlock<C>*block = blocks, *next = blocks + 1;
    Step step = walk.start(begin);
    find(args, step, *block);
    for (int64_t unit = begin; unit < end; ++unit) {
      worker.begin(step);
      for (bool last = false; !last;) {
        last = step.last_of_unit();
        const bool more = !last || unit + 1 < end;
        Step after = step;
        if (more) walk.advance(after), find(args, after, *next);
        worker.add(step, *block, more ? next : nullptr);
        if (last) worker.end(step);
        step = after;
        std::swap(block, next);
      }
    }
  });
}

// ---- the end ----

template <Order kOrder, class T>
LLMSYS_INLINE void store_columns(T* p, Block block, int64_t count) {
  if (count >= kColumns) return store_block<kOrder, false>(p, block);
  if constexpr (kOrder == Order::alternate) block = halved(block);
  store(p, block.first, int(smaller(count, kLanes)));
  if (count > kLanes) store(p + kLanes, block.second, int(count - kLanes));
}

// y and lse of one row of one key head, from all splits.
template <Order kOrder>
void merge_row(const Work& args, int64_t b, int64_t head, int64_t row) {
  const int64_t rows = args.rows, columns = args.columns;
  const int64_t h = head * (args.heads / args.kv_heads) + row / args.tokens, t = row % args.tokens;
  const Span span = seen_by_all(args, b);
  const int64_t first = first_split(span), end = end_split(span);

  float largest = args.sinks ? args.sinks[h] : -kInfinity;
  for (int64_t split = first; split < end; ++split) {
    const float m = args.part(b, head, split)[row];
    largest = m > largest ? m : largest;
  }
  const float shift = finite_or_zero(splat(largest))[0];
  double total = args.sinks ? exp(splat(args.sinks[h] - shift))[0] : 0.0f;
  for (int64_t split = first; split < end; ++split) {
    float* part = args.part(b, head, split);
    part[row] = exp(splat(part[row] - shift))[0];  // the weight, in the place of m
    total += double(part[row]) * part[rows + row];
  }
  args.lse[(b * args.heads + h) * args.tokens + t] = float(shift + __builtin_log(total));
  const float inverse = total == 0.0 ? 0.0f : float(1.0 / total);

  with_type(args.dtype, [&](auto element) {
    auto* y = static_cast<decltype(element)*>(args.y) + ((b * args.tokens + t) * args.heads + h) * args.value_dim;
    for (int64_t column = 0; column < args.value_dim; column += kColumns) {
      Block sum = {};
      for (int64_t split = first; split < end; ++split) {
        const float* part = args.part(b, head, split);
        const float w = part[row];
        if (w == 0.0f) continue;
        const float* values = part + 2 * rows + row * columns + column;
        sum = {multiply_add(load(values), w, sum.first), multiply_add(load(values + kLanes), w, sum.second)};
      }
      store_columns<kOrder>(y + column, {sum.first * inverse, sum.second * inverse}, args.value_dim - column);
    }
  });
}

template <class Items, class C>
void run(const Work& args) {
  if (args.rows > 4 && kMaxRows >= 8)
    run_units<Items, C, kMaxRows>(args);
  else if (args.rows > 2 && kMaxRows >= 4)
    run_units<Items, C, (kMaxRows < 4 ? kMaxRows : 4)>(args);
  else if (args.rows > 1)
    run_units<Items, C, 2>(args);
  else
    run_units<Items, C, 1>(args);
  const int64_t all = args.batch * args.kv_heads * args.rows;
  parallel_for(all, grain_of(args.max_splits * args.columns * 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      merge_row<order_of<C>>(args, i / args.rows / args.kv_heads, i / args.rows % args.kv_heads, i % args.rows);
  });
}

void run(const Work& args) {
#if defined(__AVX512BF16__)
  if (args.dtype == DType::bfloat16) return args.int8 ? run<Pairs, int8_t>(args) : run<Pairs, bfloat16>(args);
#endif
  if (args.int8) return run<Singles, int8_t>(args);
  with_type(args.dtype, [&](auto element) { run<Singles, decltype(element)>(args); });
}

}  // namespace

void attention_decode(const AttentionDecode& given) {
  static thread_local Buffer parts;
  Work args = {given, nullptr, given.tokens * (given.heads / given.kv_heads),
               ceil_div(given.value_dim, kColumns) * kColumns, 0};
  if (args.batch == 0 || args.tokens == 0) return;
  for (int64_t b = 0; b < args.batch; ++b)
    args.max_splits = larger(args.max_splits, ceil_div(args.cache_seqlens[b], kSplitKeys));
  args.parts = parts.at_least(args.batch * args.kv_heads * args.max_splits * args.part_floats());
  run(args);
  parts.keep_at_most(kKeptFloats);
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(attention_decode, AttentionDecode)
