// Attention on the CPU, backward: weights are made again from the logarithms of their sums, block by block.
//
// A unit (cpu_backward_plan.h) takes a block of keys after the other, packs it, and goes through the queries of its
// heads: five products a block, with the gradients of keys and values in float32, or double, beside. The order of
// every sum follows from the sizes.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "ops/attention/cpu_backward_bias.h"
#include "ops/attention/cpu_kernels.h"

namespace pvk::attention::PVK_ISA {
namespace {

constexpr int64_t kWorkOfPiece = 1 << 20;

template <typename T>
int64_t padded(int64_t columns) {
  return ceil_div<int64_t>(columns, kLanes<T>) * kLanes<T>;
}

// Head h of batch b.
template <typename scalar_t>
Rows<scalar_t> rows_of(void* data, const int64_t (&stride)[3], int64_t b, int64_t h, int64_t first) {
  return {static_cast<scalar_t*>(data) + b * stride[0] + h * stride[1] + first * stride[2], stride[2]};
}
template <typename scalar_t>
Rows<const scalar_t> rows_of(const void* data, const int64_t (&stride)[3], int64_t b, int64_t h, int64_t first) {
  return {static_cast<const scalar_t*>(data) + b * stride[0] + h * stride[1] + first * stride[2], stride[2]};
}

template <typename scalar_t, typename In>
class Backward {
 public:
  using T = opmath_t<scalar_t>;

  explicit Backward(const AttentionBackwardParams& params)
      : params_(params),
        p_(params.forward),
        plan_(params),
        bias_(params, plan_),
        features_(p_.D),
        values_(p_.E),
        shared_(p_.H / p_.G) {
    // With one block of keys a query's gradient is complete at once.
    if (plan_.key_blocks == 1) return;
    const int64_t elements = plan_.parts * p_.B * p_.H * p_.L * features_.padded();
    query_sums_.reserve(elements);
    zero_in_parallel(query_sums_.data(), elements * int64_t(sizeof(T)));
  }

  void run() {
    const int64_t units = plan_.units();
    const int64_t work = max_of<int64_t>(1, p_.B * p_.H * p_.L * p_.S * (p_.D + p_.E) / units);
    parallel_for(units, max_of<int64_t>(1, min_of(kWorkOfPiece / work, units / (2 * BackwardPlan::kUnits))),
                 [&](int64_t begin, int64_t end) {
                   Thread thread(*this);
                   for (int64_t unit = begin; unit < end; ++unit) run_unit(thread, unit);
                 });
    if (plan_.key_blocks > 1) finish_queries();
    bias_.finish();
  }

 private:
  struct Thread {
    BiasRows<scalar_t> bias;
    Dropout dropout;
    Buffer<In> keys, values, key_rows;                 // panels: a lane a key; and keys as they are
    Buffer<In> queries, grads, query_rows, grad_rows;  // of a block: panels; rows, where they are converted
    Buffer<T> weights, slopes;                         // [queries][pitch]; the gradients of the scores
    Buffer<In> weight_pairs, slope_pairs, slope_rows;
    Buffer<T> key_sums, value_sums, query_sums, kept;
    Buffer<bool> absent;
    int64_t pitch;
    int64_t copy = 0;  // of the bias's gradient

    explicit Thread(const Backward& f) : bias(f.p_), dropout(f.p_) {
      const AttentionParams& p = f.p_;
      const int64_t rows = ceil_div(p.L, f.plan_.query_blocks), keys_of_block = ceil_div(p.S, f.plan_.key_blocks);
      const int64_t D = f.features_.padded(), E = f.values_.padded();
      pitch = padded<T>(keys_of_block);
      keys.reserve(pitch * padded_depth<In>(p.D));
      values.reserve(pitch * padded_depth<In>(p.E));
      key_rows.reserve(padded_depth<In>(keys_of_block) * D);
      queries.reserve(padded_depth<In>(rows) * D);
      grads.reserve(padded_depth<In>(rows) * E);
      weights.reserve(rows * pitch);
      slopes.reserve(rows * pitch + kLanes<T>);  // read in registers from any column on
      if (sizeof(In) != sizeof(scalar_t)) query_rows.reserve(rows * D), grad_rows.reserve(rows * E);
      if (kPairs<In>) {
        weight_pairs.reserve(padded_depth<In>(rows) * pitch);
        slope_pairs.reserve(padded_depth<In>(rows) * pitch);
        slope_rows.reserve(rows * pitch);
      }
      key_sums.reserve(keys_of_block * D);
      value_sums.reserve(keys_of_block * E);
      if (f.plan_.key_blocks == 1) query_sums.reserve(rows * D);
      if (dropout.is_given()) kept.reserve(pitch);
    }
  };

  // Keys [first, first + count) of a batch, of which others may follow that are masked for all.
  struct Keys {
    int64_t b, g, first, count, in_batch;
  };
  struct Queries {
    int64_t h, first, rows;
  };

  void run_unit(Thread& thread, int64_t unit) {
    const int64_t part = unit % plan_.parts, head_chunk = unit / plan_.parts % plan_.head_chunks;
    const int64_t batch_chunk = unit / plan_.parts / plan_.head_chunks;
    const auto border = [](int64_t count, int64_t chunk, int64_t chunks) { return count * chunk / chunks; };
    thread.copy = plan_.copy_of(batch_chunk, head_chunk, part);
    for (int64_t b = border(p_.B, batch_chunk, plan_.batch_chunks);
         b < border(p_.B, batch_chunk + 1, plan_.batch_chunks); ++b)
      for (int64_t g = border(p_.G, head_chunk, plan_.head_chunks); g < border(p_.G, head_chunk + 1, plan_.head_chunks);
           ++g)
        for (int64_t block = border(plan_.key_blocks, part, plan_.parts);
             block < border(plan_.key_blocks, part + 1, plan_.parts); ++block)
          run_keys(thread, b, g, part, p_.S * block / plan_.key_blocks, p_.S * (block + 1) / plan_.key_blocks);
  }

  void run_keys(Thread& thread, int64_t b, int64_t g, int64_t part, int64_t first, int64_t end) {
    const int64_t in_batch = keys_of(p_, b);
    const Keys keys{b, g, first, max_of<int64_t>(0, min_of(end, in_batch) - first), in_batch};
    std::memset(thread.key_sums.data(), 0, uint64_t(keys.count * features_.padded()) * sizeof(T));
    std::memset(thread.value_sums.data(), 0, uint64_t(keys.count * values_.padded()) * sizeof(T));
    const bool finite = pack(thread, keys, nullptr);
    for (int64_t h = g * shared_; h < (g + 1) * shared_; ++h) {
      if (!finite) {
        thread.absent.reserve(p_.S);
        find_absent(p_, thread.bias, b, h, in_batch, thread.absent.data());
        pack(thread, keys, thread.absent.data() + first);
      }
      for (int64_t block = 0; block < plan_.query_blocks; ++block) {
        const int64_t begin = p_.L * block / plan_.query_blocks;
        run_block(thread, keys, {h, begin, p_.L * (block + 1) / plan_.query_blocks - begin}, part);
      }
    }
    store_keys(thread, keys, end);
  }

  // False where a bias might mask what is not finite.
  bool pack(Thread& thread, const Keys& k, const bool* skipped) const {
    const auto keys = rows_of<scalar_t>(p_.key, p_.key_stride, k.b, k.g, k.first);
    const auto values = rows_of<scalar_t>(p_.value, p_.value_stride, k.b, k.g, k.first);
    if (k.count == 0) return true;
    const Panels<T> lanes(k.count);
    pack_transposed<In, scalar_t>(thread.keys.data(), lanes, keys, p_.D, skipped);
    pack_transposed<In, scalar_t>(thread.values.data(), lanes, values, p_.E, skipped);
    pack_rows<In, scalar_t>(thread.key_rows.data(), features_, keys, k.count, skipped);
    return p_.bias == nullptr || skipped != nullptr ||
           (all_finite(keys, k.count, p_.D) && all_finite(values, k.count, p_.E));
  }

  void run_block(Thread& thread, const Keys& k, const Queries& q, int64_t part) {
    const KeyRange seen = window_of(p_, k.in_batch, q.first, q.first + q.rows - 1);
    const KeyRange range{max_of<int64_t>(0, seen.begin - k.first), min_of(k.count, seen.end - k.first)};
    const bool completes = plan_.key_blocks == 1;
    const auto grad_query = rows_of<scalar_t>(params_.grad_query, params_.grad_query_stride, k.b, q.h, q.first);
    if (range.is_empty()) {
      if (completes) zero_rows(grad_query, 0, q.rows, p_.D);
      return;
    }
    const Panels<T> lanes(k.count);
    int64_t panel = 0;
    while (lanes.first_output(panel) + lanes.outputs_of(panel) <= range.begin) ++panel;
    const int64_t begin = lanes.first_output(panel);
    const int64_t end = score(thread, k, q, lanes, panel, range.end);
    for (int64_t i = 0; i < q.rows; ++i) differentiate(thread, k, q, i, begin, end);

    const int64_t count = min_of(end, k.count) - begin;
    const auto [weights, slopes, slope_rows] = operands(thread, q.rows, begin, end);
    add_columns(weights, thread, begin, count, q.rows, values_, thread.grads.data(), thread.value_sums.data());
    add_columns(slopes, thread, begin, count, q.rows, features_, thread.queries.data(), thread.key_sums.data());
    T* const sums =
        completes ? thread.query_sums.data()
                  : query_sums_.data() + (((part * p_.B + k.b) * p_.H + q.h) * p_.L + q.first) * features_.padded();
    for (int64_t f = 0; f < features_.count; ++f) {
      const int vectors = features_.vectors_of(f);
      multiply_rows(
          Product<In>{slope_rows, thread.pitch, q.rows, count,
                      thread.key_rows.data() + panel_offset<In>(features_, f, k.count) + begin * vectors * kLanes<T>,
                      vectors, sums + features_.first_output(f), features_.padded(), !completes});
    }
    if (!completes) return;
    for (int64_t i = 0; i < q.rows; ++i) store_row(grad_query.at(i), sums + i * features_.padded(), p_.D, T(p_.scale));
  }

  // Products of queries with keys, and of grad_output with values, panel after panel until `last`; returns their end.
  int64_t score(Thread& thread, const Keys& k, const Queries& q, const Panels<T>& lanes, int64_t panel,
                int64_t last) const {
    const auto queries = rows_of<scalar_t>(p_.query, p_.query_stride, k.b, q.h, q.first);
    const auto grads = rows_of<scalar_t>(params_.grad_output, params_.grad_output_stride, k.b, q.h, q.first);
    pack_rows<In, scalar_t>(thread.queries.data(), features_, queries, q.rows, nullptr);
    pack_rows<In, scalar_t>(thread.grads.data(), values_, grads, q.rows, nullptr);
    const Rows<const In> query_rows = left_rows<In, scalar_t>(queries, q.rows, p_.D, thread.query_rows.data());
    const Rows<const In> grad_rows = left_rows<In, scalar_t>(grads, q.rows, p_.E, thread.grad_rows.data());
    int64_t end = 0;
    for (; panel < lanes.count && lanes.first_output(panel) < last; ++panel) {
      const int vectors = lanes.vectors_of(panel);
      const int64_t first = lanes.first_output(panel);
      multiply_rows(Product<In>{query_rows.data, query_rows.stride, q.rows, p_.D,
                                thread.keys.data() + panel_offset<In>(lanes, panel, p_.D), vectors,
                                thread.weights.data() + first, thread.pitch, false});
      multiply_rows(Product<In>{grad_rows.data, grad_rows.stride, q.rows, p_.E,
                                thread.values.data() + panel_offset<In>(lanes, panel, p_.E), vectors,
                                thread.slopes.data() + first, thread.pitch, false});
      end = first + vectors * kLanes<T>;
    }
    return end;
  }

  // The sum of a query's weights * their gradients: that of grad_output * output is the same.
  PVK_INLINE T delta_of(int64_t b, int64_t h, int64_t i) const {
    const auto grad = rows_of<scalar_t>(params_.grad_output, params_.grad_output_stride, b, h, i);
    const auto output = rows_of<scalar_t>(static_cast<const void*>(p_.output), p_.output_stride, b, h, i);
    Vec<T> sum{};
    for (int64_t c = 0; c < p_.E; c += kLanes<T>)
      sum = fma(load_at_most<scalar_t, T>(grad.data + c, p_.E - c),
                load_at_most<scalar_t, T>(output.data + c, p_.E - c), sum);
    return sum_of_lanes<T>(sum);
  }

  // Of a row's columns [begin, end): products become weights, and the gradients of the scores.
  void differentiate(Thread& thread, const Keys& k, const Queries& q, int64_t i, int64_t begin, int64_t end) const {
    T* const weights = thread.weights.data() + i * thread.pitch + begin;
    T* const slopes = thread.slopes.data() + i * thread.pitch + begin;
    const int64_t query = q.first + i, origin = k.first + begin;
    const KeyRange seen = window_of(p_, k.in_batch, query, query);
    const int64_t last = max_of(origin, min_of(seen.end, min_of(k.first + k.count, origin + end - begin)));
    const int64_t first = min_of(last, max_of(seen.begin, origin));
    const T* const bias = thread.bias.is_given() ? thread.bias.row(k.b, q.h, query, {first, last}) + origin : nullptr;
    const ScoreRow<T> row(weights, bias, T(p_.scale), first - origin, last - origin);
    const T lse = static_cast<const T*>(p_.lse)[(k.b * p_.H + q.h) * p_.L + query];
    const T center = lse == -kInfinity<T> ? kInfinity<T> : lse;
    if (thread.dropout.is_given()) {
      T* const kept = thread.kept.data();
      for (int64_t c = 0; c < end - begin; ++c) kept[c] = T(1);
      thread.dropout.apply(kept + row.begin, k.b, q.h, query, first, last);
      differentiate_row(row, slopes, center, k.b, q.h, query,
                        [&](int64_t c) __attribute__((always_inline)) { return load(kept + c); });
    } else {
      differentiate_row(row, slopes, center, k.b, q.h, query,
                        [](int64_t) __attribute__((always_inline)) { return splat(T(1)); });
    }
    row.each_outside(end - begin, [&](int64_t c) __attribute__((always_inline)) {
      store(weights + c, Vec<T>{});
      store(slopes + c, Vec<T>{});
    });
    if (bias_.is_given() && first < last)
      bias_.add(slopes + row.begin, thread.copy, k.b, q.h, query, first, last - first);
  }

  // A masked weight is -0 until its slope is made. Where the row is whole, weights are made to sum to 1 again, which
  // the rounding of a large logarithm spoils.
  template <typename Factor>
  PVK_INLINE void differentiate_row(const ScoreRow<T>& row, T* slopes, T center, int64_t b, int64_t h, int64_t i,
                                    const Factor& factor_of) const {
    T* const weights = row.scores;
    const Vec<T> masked = splat(T(-0.0));
    Vec<T> sum{}, slope_sum{};
    row.each([&](int64_t c, Vec<T> x) __attribute__((always_inline)) {
      const Vec<T> weight = weight_of<T>(x - center);
      sum += weight;
      slope_sum = fma(weight, load(slopes + c) * factor_of(c), slope_sum);
      store(weights + c, x == splat(-kInfinity<T>) ? masked : weight);
    });
    const bool is_whole = plan_.key_blocks == 1;
    const T total = is_whole ? sum_of_lanes<T>(sum) : T(1), share = total == T(0) ? T(0) : T(1) / total;
    const T delta = is_whole ? sum_of_lanes<T>(slope_sum) * share : delta_of(b, h, i);
    const T* const grad_lse = static_cast<const T*>(params_.grad_lse);
    const T center_of_slopes = grad_lse == nullptr ? delta : delta - grad_lse[(b * p_.H + h) * p_.L + i];
    for (int64_t c = row.first; c < row.last; c += kLanes<T>) {
      const Vec<T> weight = load(weights + c), scaled = weight * share, factor = factor_of(c);
      const Vec<T> slope = scaled * (load(slopes + c) * factor - center_of_slopes);
      store(weights + c, scaled * factor);
      store(slopes + c, (Mask<T>)weight == (Mask<T>)masked ? Vec<T>{} : slope);
    }
  }

  // Weights and slopes as the products read them: by columns, by columns, by rows from column `begin` on.
  struct Operands {
    const In *weights, *slopes, *slope_rows;
  };
  Operands operands(Thread& thread, [[maybe_unused]] int64_t rows, int64_t begin, [[maybe_unused]] int64_t end) const {
#if defined(__AVX512F__)
    if constexpr (kPairs<In>) {
      narrow_pairs(thread.weight_pairs.data(), thread.weights.data(), rows, thread.pitch, begin, end);
      narrow_pairs(thread.slope_pairs.data(), thread.slopes.data(), rows, thread.pitch, begin, end);
      narrow_rows(thread.slope_rows.data(), thread.slopes.data(), rows, thread.pitch, begin, end);
      return {thread.weight_pairs.data() + 2 * begin, thread.slope_pairs.data() + 2 * begin,
              thread.slope_rows.data() + begin};
    } else
#endif
      return {thread.weights.data() + begin, thread.slopes.data() + begin, thread.slopes.data() + begin};
  }

  // sums[begin + j] += the sum over the rows i of left[i][j] * panels[i].
  void add_columns(const In* left, const Thread& thread, int64_t begin, int64_t count, int64_t rows,
                   const Panels<T>& columns, const In* panels, T* sums) const {
    for (int64_t f = 0; f < columns.count; ++f)
      multiply_columns(Product<In>{left, thread.pitch, count, rows, panels + panel_offset<In>(columns, f, rows),
                                   columns.vectors_of(f), sums + begin * columns.padded() + columns.first_output(f),
                                   columns.padded(), true});
  }

  void store_keys(Thread& thread, const Keys& k, int64_t end) const {
    const auto grad_key = rows_of<scalar_t>(params_.grad_key, params_.grad_key_stride, k.b, k.g, k.first);
    const auto grad_value = rows_of<scalar_t>(params_.grad_value, params_.grad_value_stride, k.b, k.g, k.first);
    const T* const key_sums = thread.key_sums.data();
    const T* const value_sums = thread.value_sums.data();
    for (int64_t j = 0; j < k.count; ++j) {
      store_row(grad_key.at(j), key_sums + j * features_.padded(), p_.D, T(p_.scale));
      store_row(grad_value.at(j), value_sums + j * values_.padded(), p_.E, T(1));
    }
    zero_rows(grad_key, k.count, end - k.first, p_.D);
    zero_rows(grad_value, k.count, end - k.first, p_.E);
    if (p_.bias == nullptr) return;
    if (all_finite(Rows<const T>{key_sums, features_.padded()}, k.count, p_.D) &&
        all_finite(Rows<const T>{value_sums, values_.padded()}, k.count, p_.E))
      return;
    zero_absent(thread, k, grad_key, grad_value);
  }

  // Of keys that every query head masks, where NaN came from a gradient.
  void zero_absent(Thread& thread, const Keys& k, Rows<scalar_t> grad_key, Rows<scalar_t> grad_value) const {
    Buffer<bool> everywhere(p_.S);
    thread.absent.reserve(p_.S);
    for (int64_t h = k.g * shared_; h < (k.g + 1) * shared_; ++h) {
      find_absent(p_, thread.bias, k.b, h, k.in_batch, thread.absent.data());
      for (int64_t j = k.first; j < k.first + k.count; ++j)
        everywhere[j] = thread.absent[j] && (h == k.g * shared_ || everywhere[j]);
    }
    for (int64_t j = 0; j < k.count; ++j) {
      if (!everywhere[k.first + j]) continue;
      zero_rows(grad_key, j, j + 1, p_.D);
      zero_rows(grad_value, j, j + 1, p_.E);
    }
  }

  void finish_queries() const {
    const int64_t rows = p_.B * p_.H * p_.L, pitch = features_.padded();
    parallel_for(rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* const sums = const_cast<Buffer<T>&>(query_sums_).data() + row * pitch;
        for (int64_t part = 1; part < plan_.parts; ++part)
          for (int64_t c = 0; c < pitch; c += kLanes<T>)
            store(sums + c, load(sums + c) + load(sums + part * rows * pitch + c));
        const int64_t i = row % p_.L, h = row / p_.L % p_.H, b = row / p_.L / p_.H;
        store_row(rows_of<scalar_t>(params_.grad_query, params_.grad_query_stride, b, h, i).data, sums, p_.D,
                  T(p_.scale));
      }
    });
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  const BackwardPlan plan_;
  BiasGradient<scalar_t> bias_;
  const Panels<T> features_, values_;
  const int64_t shared_;
  Buffer<T> query_sums_;  // [parts][B, H, L][features, padded]
};

template <typename scalar_t>
void backward_typed(const AttentionBackwardParams& params) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 2) {
    if (params.forward.dtype == DType::kBFloat16 && cpu_has_bfloat16_dot())
      return Backward<BFloat16, BFloat16>(params).run();
  }
#endif
  Backward<scalar_t, opmath_t<scalar_t>>(params).run();
}

}  // namespace

void backward(const AttentionBackwardParams& params) {
  dispatch_floating(params.forward.dtype, [&](auto scalar) { backward_typed<decltype(scalar)>(params); });
}

}  // namespace pvk::attention::PVK_ISA
