// Attention on the CPU, forward: blocks of queries, all scores of a row at once where keys are few, else block after
// block of them with running sums.
//
// Keys and values of a head are packed once, keys with a lane each. Where heads are many, a thread owns a head; else
// all are packed first, and a thread owns a block of queries. A row's result depends on neither.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "ops/attention/cpu_kernels.h"
#include "ops/attention/cpu_scores.h"

namespace pvk::attention {
namespace PVK_ISA {
namespace {

constexpr int64_t kKeysAtOnce = 1024, kKeysOfBlock = 512;  // with running sums
constexpr int64_t kQueriesOfBlock = 48, kQueriesOfTile = 6;
constexpr int64_t kHeadsOfThread = 4;
constexpr int64_t kWorkOfPiece = 1 << 20;  // products, below which threads wait for each other

template <typename scalar_t, typename In>
class Forward {
 public:
  using T = opmath_t<scalar_t>;

  explicit Forward(const AttentionParams& p) : p_(p), values_(p.E), heads_(p.B * p.G), shared_(p.H / p.G) {
    blocks_ = ceil_div(p.L, kQueriesOfBlock);
    head_elements_ = ceil_div<int64_t>(p.S, kLanes<T>) * kLanes<T> * padded_depth<In>(p.D) +
                     padded_depth<In>(p.S) * values_.padded();
  }

  void run() const {
    const int64_t threads = thread_count();
    if (threads == 1 || heads_ >= kHeadsOfThread * threads || p_.L * shared_ <= kQueriesOfBlock) {
      const int64_t work = max_of<int64_t>(1, p_.L * p_.S * shared_ * (p_.D + p_.E));
      parallel_for(heads_, max_of<int64_t>(1, min_of(kWorkOfPiece / work, heads_ / (kHeadsOfThread * threads))),
                   [&](int64_t begin, int64_t end) {
                     Buffer<In> packed(head_elements_);
                     Thread thread(*this);
                     for (int64_t head = begin; head < end; ++head) run_head(thread, head, packed.data());
                   });
      return;
    }
    Buffer<In> packed(heads_ * head_elements_);
    Buffer<bool> finite(heads_);
    parallel_for(heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head)
        finite[head] = pack(head, packed.data() + head * head_elements_, nullptr);
    });
    parallel_for(heads_ * shared_ * blocks_, 1, [&](int64_t begin, int64_t end) {
      Thread thread(*this);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / (shared_ * blocks_), of_group = item / blocks_ % shared_;
        const In* from = packed.data() + head * head_elements_;
        if (!finite[head]) from = repack(thread, head, of_group);
        run_block(thread, head, of_group, item % blocks_, from);
      }
    });
  }

 private:
  // What a thread works in.
  struct Thread {
    BiasRows<scalar_t> bias;
    Dropout dropout;
    Buffer<T> scores, sums;
    Buffer<In> queries, weights, repacked;
    Buffer<bool> absent;
    T largest[kQueriesOfBlock], total[kQueriesOfBlock];

    explicit Thread(const Forward& f) : bias(f.p_), dropout(f.p_) {
      const int64_t rows = min_of(f.p_.L, kQueriesOfBlock);
      pitch = min_of(kKeysAtOnce, ceil_div<int64_t>(f.p_.S, kLanes<T>) * kLanes<T>);
      scores.reserve(rows * pitch);
      sums.reserve(rows * f.values_.padded());
      if (sizeof(In) != sizeof(scalar_t)) queries.reserve(rows * (f.p_.D + kLanes<T>));
      if (kPairs<In>) weights.reserve(rows * pitch);
    }

    int64_t pitch;  // of scores and weights
  };

  // Blocks of whole tiles, but for the last.
  int64_t first_query(int64_t block) const {
    return min_of(p_.L, ceil_div(p_.L, kQueriesOfTile) * block / blocks_ * kQueriesOfTile);
  }

  Rows<const scalar_t> keys_at(int64_t b, int64_t g) const {
    return {static_cast<const scalar_t*>(p_.key) + b * p_.key_stride[0] + g * p_.key_stride[1], p_.key_stride[2]};
  }
  Rows<const scalar_t> values_at(int64_t b, int64_t g) const {
    return {static_cast<const scalar_t*>(p_.value) + b * p_.value_stride[0] + g * p_.value_stride[1],
            p_.value_stride[2]};
  }
  In* values_in(In* packed, const Panels<T>& keys) const { return packed + keys.padded() * padded_depth<In>(p_.D); }

  // False where a bias might mask what is not finite.
  bool pack(int64_t head, In* packed, const bool* skipped) const {
    const int64_t b = head / p_.G, g = head % p_.G;
    const Panels<T> keys(keys_of(p_, b));
    if (keys.outputs == 0) return true;
    pack_transposed<In, scalar_t>(packed, keys, keys_at(b, g), p_.D, skipped);
    pack_rows<In, scalar_t>(values_in(packed, keys), values_, values_at(b, g), keys.outputs, skipped);
    return p_.bias == nullptr || skipped != nullptr ||
           (all_finite(keys_at(b, g), keys.outputs, p_.D) && all_finite(values_at(b, g), keys.outputs, p_.E));
  }

  // Without the keys that a query head masks.
  const In* repack(Thread& thread, int64_t head, int64_t of_group) const {
    const int64_t b = head / p_.G, h = head % p_.G * shared_ + of_group;
    thread.repacked.reserve(head_elements_);
    thread.absent.reserve(p_.S);
    find_absent(p_, thread.bias, b, h, keys_of(p_, b), thread.absent.data());
    pack(head, thread.repacked.data(), thread.absent.data());
    return thread.repacked.data();
  }

  void run_head(Thread& thread, int64_t head, In* packed) const {
    const bool finite = pack(head, packed, nullptr);
    for (int64_t of_group = 0; of_group < shared_; ++of_group) {
      const In* const from = finite ? packed : repack(thread, head, of_group);
      for (int64_t block = 0; block < blocks_; ++block) run_block(thread, head, of_group, block, from);
    }
  }

  void run_block(Thread& thread, int64_t head, int64_t of_group, int64_t block, const In* packed) const {
    const int64_t b = head / p_.G, h = head % p_.G * shared_ + of_group;
    const int64_t first = first_query(block), rows = first_query(block + 1) - first;
    const Panels<T> keys(keys_of(p_, b));
    const KeyRange range = window_of(p_, keys.outputs, first, first + rows - 1);
    const Rows<const scalar_t> queries{static_cast<const scalar_t*>(p_.query) + b * p_.query_stride[0] +
                                           h * p_.query_stride[1] + first * p_.query_stride[2],
                                       p_.query_stride[2]};
    const Rows<const In> left = left_rows<In, scalar_t>(queries, rows, p_.D, thread.queries.data());
    for (int64_t i = 0; i < rows; ++i) thread.largest[i] = -kInfinity<T>, thread.total[i] = T(0);
    std::memset(thread.sums.data(), 0, range.is_empty() ? uint64_t(rows * values_.padded()) * sizeof(T) : 0);
    const int64_t most = range.end - range.begin <= kKeysAtOnce - 2 * kPanelWidth<T> ? kKeysAtOnce : kKeysOfBlock;
    bool is_first = true;
    for (int64_t panel = 0; panel < keys.count && !range.is_empty();) {
      const int64_t begin = keys.first_output(panel);
      if (begin >= range.end) break;
      if (begin + keys.outputs_of(panel) <= range.begin) {
        ++panel;
        continue;
      }
      int64_t width = 0;
      for (; panel < keys.count && begin + width < range.end; ++panel) {
        const int vectors = keys.vectors_of(panel);
        if (width + vectors * kLanes<T> > most) break;
        multiply_rows(Product<In>{left.data, left.stride, rows, p_.D, packed + panel_offset<In>(keys, panel, p_.D),
                                  vectors, thread.scores.data() + width, thread.pitch, false});
        width += vectors * kLanes<T>;
      }
      add_keys(thread, {b, h, first, rows, begin, width, keys.outputs, is_first}, packed);
      is_first = false;
    }
    finish(thread, b, h, first, rows);
  }

  // A block of queries with a block of keys.
  struct Block {
    int64_t b, h, first, rows, begin, width, keys;
    bool is_first;
  };

  // Scores become weights, and their products with the values are added to the sums.
  void add_keys(Thread& thread, const Block& k, const In* packed) const {
    for (int64_t i = 0; i < k.rows; ++i) weigh(thread, k, i);
    const int64_t count = min_of(k.width, k.keys - k.begin);
    const In* left;
#if defined(__AVX512F__)
    if constexpr (kPairs<In>) {
      narrow_rows(thread.weights.data(), thread.scores.data(), k.rows, thread.pitch, 0, k.width);
      left = thread.weights.data();
    } else
#endif
      left = thread.scores.data();
    const In* const values = packed + Panels<T>(k.keys).padded() * padded_depth<In>(p_.D);
    for (int64_t panel = 0; panel < values_.count; ++panel) {
      const int vectors = values_.vectors_of(panel);
      multiply_rows(Product<In>{left, thread.pitch, k.rows, count,
                                values + panel_offset<In>(values_, panel, k.keys) + k.begin * vectors * kLanes<T>,
                                vectors, thread.sums.data() + values_.first_output(panel), values_.padded(),
                                !k.is_first});
    }
  }

  void weigh(Thread& thread, const Block& k, int64_t i) const {
    T* const scores = thread.scores.data() + i * thread.pitch;
    const KeyRange range = window_of(p_, k.keys, k.first + i, k.first + i);
    const int64_t end = max_of(k.begin, min_of(range.end, k.begin + k.width));
    const int64_t begin = min_of(end, max_of(range.begin, k.begin));
    const T* const bias =
        thread.bias.is_given() ? thread.bias.row(k.b, k.h, k.first + i, {begin, end}) + k.begin : nullptr;
    const ScoreRow<T> row(scores, bias, T(p_.scale), begin - k.begin, end - k.begin);
    const T before = thread.largest[i];
    T largest, scale = T(1);  // of what is in scores
    if (bias == nullptr && p_.scale > 0) {
      scale = T(p_.scale);
      largest = max_of(before, row.largest_unscaled() * scale);
    } else {
      Vec<T> most = splat(before);
      row.each([&](int64_t c, Vec<T> x) __attribute__((always_inline)) {
        store(scores + c, x);
        most = larger_of<T>(most, x);
      });
      largest = largest_of_lanes<T>(most);
    }
    const T center = largest == -kInfinity<T> ? T(0) : largest;
    Vec<T> sum{};
    for (int64_t c = row.first; c < row.last; c += kLanes<T>) {
      const Vec<T> weight = weight_of<T>(load(scores + c) * scale - center);
      store(scores + c, weight);
      sum += weight;
    }
    row.each_outside(k.width, [&](int64_t c) __attribute__((always_inline)) { store(scores + c, Vec<T>{}); });
    const T total = sum_of_lanes<T>(sum);
    thread.largest[i] = largest;
    if (k.is_first) {
      thread.total[i] = total;
    } else {
      const T factor = exp_of<T>(splat(before - center))[0];
      thread.total[i] = thread.total[i] * factor + total;
      T* const sums = thread.sums.data() + i * values_.padded();
      for (int64_t c = 0; c < values_.padded(); c += kLanes<T>) store(sums + c, load(sums + c) * factor);
    }
    if (thread.dropout.is_given() && begin < end)
      thread.dropout.apply(scores + (begin - k.begin), k.b, k.h, k.first + i, begin, end);
  }

  void finish(const Thread& thread, int64_t b, int64_t h, int64_t first, int64_t rows) const {
    scalar_t* const output = static_cast<scalar_t*>(p_.output) + b * p_.output_stride[0] + h * p_.output_stride[1];
    T* const lse = static_cast<T*>(p_.lse) + (b * p_.H + h) * p_.L + first;
    T share[kQueriesOfBlock];
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
      const Vec<T> largest = load(thread.largest + i), total = load(thread.total + i), nothing = splat(-kInfinity<T>);
      const Mask<T> is_low = largest == nothing, is_empty = is_low & (total == Vec<T>{});
      store(share + i, is_empty ? Vec<T>{} : T(1) / total);
      const Vec<T> sum = (is_low ? Vec<T>{} : largest) + log_of<T>(total);
      store_at_most<T, T>(lse + i, is_empty ? nothing : sum, rows - i);
    }
    for (int64_t i = 0; i < rows; ++i)
      store_row(output + (first + i) * p_.output_stride[2], &thread.sums[i * values_.padded()], p_.E, share[i]);
  }

  const AttentionParams& p_;
  const Panels<T> values_;
  const int64_t heads_, shared_;  // key heads, query heads of each
  int64_t blocks_, head_elements_;
};

template <typename scalar_t>
void forward_typed(const AttentionParams& p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 2) {
    if (p.dtype == DType::kBFloat16 && cpu_has_bfloat16_dot()) return Forward<BFloat16, BFloat16>(p).run();
  }
#endif
  Forward<scalar_t, opmath_t<scalar_t>>(p).run();
}

}  // namespace

void forward(const AttentionParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { forward_typed<decltype(scalar)>(p); });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, AttentionParams)
PVK_CPU_ENTRY(void, backward, AttentionBackwardParams)

#if defined(PVK_ISA_BASELINE)
// Threads share what a call keeps in Buffers.
int64_t forward_scratch(const AttentionParams&) {
  return 0;
}
int64_t backward_scratch(const AttentionBackwardParams&) {
  return 0;
}
#endif

}  // namespace pvk::attention
