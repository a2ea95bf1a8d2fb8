// Sums along a row on the CPU: registers of neighbouring targets, whose taps are picked from registers of the row.
#pragma once

#include "ops/interpolate/cpu_kernels.h"

namespace pvk::interpolate::PVK_ISA {

inline constexpr int64_t kMostRegisters = 4;  // that the taps of a register of targets are picked from

// Of a row that doubles or halves: which sources, beside its own, a target of each phase adds by what weights, where
// that is the same for all but some targets at the ends.
template <typename T>
class RowPhases {
 public:
  static constexpr int64_t kLane = kLanes<T>;

  explicit RowPhases(const TapTable<T>& columns) : columns_(columns) {
    doubles_ = columns.targets == 2 * columns.sources;
    if (!doubles_ && columns.sources != 2 * columns.targets) return;
    const int64_t phases = doubles_ ? 2 : 1, steps = columns.targets / phases, middle = steps / 2 * phases;
    taps_ = columns.count(middle);
    if (taps_ != 2 && taps_ != 4 && taps_ != kMostTaps) return;
    for (int64_t phase = 0; phase < phases; ++phase) {
      if (columns.count(middle + phase) != taps_) return;
      const int64_t begin = columns.begin[middle + phase];
      offset_[phase] = columns.index[begin] - own(middle);
      for (int64_t k = 0; k < taps_; ++k) weight_[phase][k] = columns.weight[begin + k];
    }
    first_ = last_ = steps / 2;
    while (first_ > 0 && is_like_middle(first_ - 1)) --first_;
    while (last_ < steps && is_like_middle(last_)) ++last_;
  }

  bool serves() const { return last_ - first_ >= kLane; }

  // to: all targets; the others by other(target).
  template <typename Other>
  PVK_INLINE void run(const T* row, T* to, const Other& other) const {
    const int64_t phases = doubles_ ? 2 : 1;
    for (int64_t target = 0; target < first_ * phases; ++target) to[target] = other(target);
    for (int64_t target = last_ * phases; target < columns_.targets; ++target) to[target] = other(target);
    if (taps_ == 2) return run_taps<2>(row, to);
    if (taps_ == 4) return run_taps<4>(row, to);
    run_taps<8>(row, to);
  }

 private:
  static constexpr int64_t kMostTaps = 8;

  int64_t own(int64_t target) const { return doubles_ ? target / 2 : target * 2; }

  bool is_like_middle(int64_t step) const {
    for (int64_t phase = 0; phase < (doubles_ ? 2 : 1); ++phase) {
      const int64_t target = doubles_ ? 2 * step + phase : step, begin = columns_.begin[target];
      if (columns_.count(target) != taps_) return false;
      for (int64_t k = 0; k < taps_; ++k)
        if (columns_.index[begin + k] != own(target) + offset_[phase] + k ||
            columns_.weight[begin + k] != weight_[phase][k])
          return false;
    }
    return true;
  }

  // Registers begin at whole ones of `to`, but for the first and the last, which lie over their neighbours.
  template <typename Body>
  PVK_INLINE void for_registers(const Body& body) const {
    const int64_t first = first_, last = last_ - kLane;
    int64_t step = first;
    for (; step < last; step = (step / kLane + 1) * kLane) body(step);
    body(last);
  }

  template <int kTaps>
  PVK_INLINE void run_taps(const T* row, T* to) const {
    Vec<T> weight[2][kTaps];
    for (int k = 0; k < kTaps; ++k) {
      weight[0][k] = splat(weight_[0][k]);
      weight[1][k] = splat(weight_[1][k]);
    }
    const T *const even = row + offset_[0], *const odd = row + offset_[1];
    if (!doubles_) {
      return for_registers([&](int64_t step) __attribute__((always_inline)) {
        Vec<T> sum, first, second;
#pragma GCC unroll 4
        for (int k = 0; k < kTaps; k += 2) {
          load_even_odd<T, T>(even + 2 * step + k, first, second);
          sum = k == 0 ? first * weight[0][0] : fma(first, weight[0][k], sum);
          sum = fma(second, weight[0][k + 1], sum);
        }
        store(to + step, sum);
      });
    }
    for_registers([&](int64_t step) __attribute__((always_inline)) {
      Vec<T> sum = load(even + step) * weight[0][0], other = load(odd + step) * weight[1][0];
#pragma GCC unroll 8
      for (int k = 1; k < kTaps; ++k) {
        sum = fma(load(even + step + k), weight[0][k], sum);
        other = fma(load(odd + step + k), weight[1][k], other);
      }
      Vec<T> low, high;
      interleave<T>(sum, other, low, high);
      store(to + 2 * step, low);
      store(to + 2 * step + kLane, high);
    });
  }

  const TapTable<T>& columns_;
  bool doubles_ = false;
  int64_t taps_ = 0, first_ = 0, last_ = 0;  // first_, last_: targets (pairs of them) that are like the middle
  int64_t offset_[2] = {};
  T weight_[2][kMostTaps] = {};
};

// A row has `group` elements a pixel: 1 of a plane, C of a channels_last map with few channels.
template <typename T>
class RowFilter {
 public:
  static constexpr int64_t kLane = kLanes<T>;

  RowFilter(const TapTable<T>& columns, int64_t group)
      : columns_(columns),
        group_(group),
        elements_(columns.targets * group),
        blocks_(ceil_div(elements_, kLane)),
        phases_(columns) {
    if (has_phases()) return;
    block_begin_.reserve(blocks_ + 1);
    whole_.reserve(blocks_);
    int64_t taps = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      block_begin_[b] = taps;
      taps += plan_block(b);
    }
    block_begin_[blocks_] = taps;
    // Many taps of few targets leave most lanes empty.
    if (registers_ > kMostRegisters || taps * kLane > 4 * columns.begin[columns.targets] * group + 8 * kLane) {
      registers_ = 0;
      return;
    }
    base_.reserve(taps);
    lanes_.reserve(taps);
    weights_.reserve(taps);
    for (int64_t b = 0; b < blocks_; ++b) fill_block(b);
  }

  bool has_phases() const { return group_ == 1 && phases_.serves(); }

  // Elements that a row must be readable beyond its own.
  static constexpr int64_t kSpare = kMostRegisters * kLane;

  PVK_INLINE void run(const T* row, T* to) const {
    if (has_phases()) {
      return phases_.run(
          row, to, [&](int64_t target) { return sum_of(row, columns_.begin[target], columns_.begin[target + 1]); });
    }
    if (registers_ == 0) return run_one_by_one(row, to);
    if (columns_.chooses) {
      if (registers_ == 1) return run_blocks<1, true>(row, to);
      if (registers_ == 2) return run_blocks<2, true>(row, to);
      return run_blocks<4, true>(row, to);
    }
    if (registers_ == 1) return run_blocks<1, false>(row, to);
    if (registers_ == 2) return run_blocks<2, false>(row, to);
    return run_blocks<4, false>(row, to);
  }

 private:
  struct Range {
    int64_t first, last;
  };

  int64_t target_of(int64_t block, int lane) const { return min_of(block * kLane + lane, elements_ - 1) / group_; }
  int64_t within(int64_t block, int lane) const { return min_of(block * kLane + lane, elements_ - 1) % group_; }

  int64_t most_taps(int64_t block) const {
    int64_t most = 0;
    for (int lane = 0; lane < kLane; ++lane) most = max_of(most, columns_.count(target_of(block, lane)));
    return most;
  }

  // The elements that a block's tap k reads.
  Range range_of(int64_t block, int64_t k) const {
    Range range{-1, -1};
    for (int lane = 0; lane < kLane; ++lane) {
      const int64_t target = target_of(block, lane);
      if (k >= columns_.count(target)) continue;
      const int64_t place = columns_.index[columns_.begin[target] + k] * group_ + within(block, lane);
      range.first = range.first < 0 ? place : min_of(range.first, place);
      range.last = max_of(range.last, place);
    }
    return range;
  }

  int64_t plan_block(int64_t block) {
    const int64_t most = most_taps(block);
    whole_[block] = true;
    for (int lane = 0; lane < kLane; ++lane)
      whole_[block] = whole_[block] && columns_.count(target_of(block, lane)) == most;
    for (int64_t k = 0; k < most && registers_ <= kMostRegisters; ++k) {
      const Range range = range_of(block, k);
      registers_ = max_of(registers_, (range.last - range.first) / kLane + 1);
    }
    return most;
  }

  void fill_block(int64_t block) {
    for (int64_t t = block_begin_[block], k = 0; t < block_begin_[block + 1]; ++t, ++k) {
      base_[t] = range_of(block, k).first;
      for (int lane = 0; lane < kLane; ++lane) {
        const int64_t target = target_of(block, lane), place = columns_.begin[target] + k;
        const bool there = k < columns_.count(target);
        lanes_[t][lane] = there ? columns_.index[place] * group_ + within(block, lane) - base_[t] : -1;
        weights_[t][lane] = there ? columns_.weight[place] : T(0);
      }
    }
  }

  template <int kRegisters>
  static PVK_INLINE Vec<T> pick(const T* from, Mask<T> lanes) {
    if constexpr (kRegisters == 1) return __builtin_shuffle(load(from), lanes);
    const Vec<T> low = __builtin_shuffle(load(from), load(from + kLane), lanes);
    if constexpr (kRegisters == 2) return low;
    const Vec<T> high = __builtin_shuffle(load(from + 2 * kLane), load(from + 3 * kLane), lanes);
    return lanes < Mask<T>{} + decltype(lanes[0] + 0)(2 * kLane) ? low : high;
  }

  template <int kRegisters, bool kChooses>
  PVK_INLINE void run_blocks(const T* row, T* to) const {
    for (int64_t b = 0; b < blocks_; ++b) {
      Vec<T> sum{};
      const int64_t first = block_begin_[b], last = block_begin_[b + 1];
      if (whole_[b]) {
        if (first < last) {
          sum = pick<kRegisters>(row + base_[first], lanes_[first]);
          if constexpr (!kChooses) {
            sum *= weights_[first];
            for (int64_t t = first + 1; t < last; ++t)
              sum = fma(pick<kRegisters>(row + base_[t], lanes_[t]), weights_[t], sum);
          }
        }
      } else {
        for (int64_t t = first; t < last; ++t) {
          const Mask<T> there = lanes_[t] >= Mask<T>{};
          const Vec<T> value = (Vec<T>)((Mask<T>)pick<kRegisters>(row + base_[t], lanes_[t]) & there);
          sum = t == first ? value * weights_[t] : fma(value, weights_[t], sum);
        }
      }
      store_some(to + b * kLane, sum, elements_ - b * kLane);
    }
  }

  void run_one_by_one(const T* row, T* to) const {
    for (int64_t target = 0; target < columns_.targets; ++target)
      for (int64_t c = 0; c < group_; ++c)
        to[target * group_ + c] = sum_of(row + c, columns_.begin[target], columns_.begin[target + 1]);
  }

  PVK_INLINE T sum_of(const T* row, int64_t i, int64_t end) const {
    constexpr int64_t kParts = 4;
    const auto tap = [&](int64_t place) { return columns_.weight[place] * row[columns_.index[place] * group_]; };
    if (i == end) return T(0);
    T sum = tap(i++);
    if (end - i >= kParts) {
      T part[kParts] = {};
      for (; end - i >= kParts; i += kParts)
        for (int64_t k = 0; k < kParts; ++k) part[k] += tap(i + k);
      sum += (part[0] + part[1]) + (part[2] + part[3]);
    }
    for (; i < end; ++i) sum += tap(i);
    return sum;
  }

  const TapTable<T>& columns_;
  int64_t group_, elements_, blocks_, registers_ = 1;
  RowPhases<T> phases_;
  Buffer<int64_t> block_begin_, base_;
  Buffer<bool> whole_;
  Buffer<Mask<T>> lanes_;  // -1: the target has no such tap
  Buffer<Vec<T>> weights_;
};

}  // namespace pvk::interpolate::PVK_ISA
