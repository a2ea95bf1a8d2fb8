// Position-sensitive RoI align and pool on the CPU: the weights of all RoIs of an image as tables, and what is done
// with them on one plane.
#pragma once

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/ps_roi_align/ps_roi_align.h"

namespace pvk::ps_roi_align {
namespace PVK_ISA {

using namespace pvk::PVK_ISA;

// Neighbouring columns that are handled at once, and RoIs: few bins are wider than 8 pixels.
template <typename T>
inline constexpr int kRun = min_of(kLanes<T>, 8);

template <typename T>
struct RunTraits {
  typedef T type __attribute__((vector_size(kRun<T> * sizeof(T))));
};
template <typename T>
using Run = typename RunTraits<T>::type;

template <typename T>
PVK_INLINE Run<T> load_run(const T* source) {
  Run<T> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

template <typename T>
PVK_INLINE void store_run(T* target, Run<T> value) {
  std::memcpy(target, &value, sizeof(value));
}

template <typename T>
PVK_INLINE Run<T> multiply_add(Run<T> a, Run<T> b, Run<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm256_fmadd_ps(a, b, c);
#endif
  if constexpr (kRun<T> == kLanes<T>) return fma(a, b, c);
}

// a * weight, and 0 where the weight is: a pixel beside the bin may be NaN.
template <typename T>
PVK_INLINE Run<T> weighted(Run<T> a, Run<T> weight) {
  const auto used = weight != Run<T>{};
  return (Run<T>)((decltype(used))(a * weight) & used);
}

// Lane i of the result is the sum over the lanes of parts[i].
template <typename T>
PVK_INLINE Run<T> sum_across(const Run<T>* parts) {
  using Index = decltype(Run<T>{} != Run<T>{});
  const auto add = [](Run<T> a, Run<T> b, Index first, Index second) {
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
  };
  if constexpr (kRun<T> == 8) {  // within 128 bits until the last
    constexpr Index even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = {1, 3, 9, 11, 5, 7, 13, 15};
    Run<T> halves[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      halves[i] = add(add(parts[4 * i], parts[4 * i + 1], even, odd),
                      add(parts[4 * i + 2], parts[4 * i + 3], even, odd), even, odd);
    return add(halves[0], halves[1], Index{0, 1, 2, 3, 8, 9, 10, 11}, Index{4, 5, 6, 7, 12, 13, 14, 15});
  } else if constexpr (kRun<T> == 4) {
    constexpr Index even = {0, 2, 4, 6}, odd = {1, 3, 5, 7};
    return add(add(parts[0], parts[1], even, odd), add(parts[2], parts[3], even, odd), even, odd);
  } else {
    return add(parts[0], parts[1], Index{0, 2}, Index{1, 3});
  }
}

// Two rows of a bin, so that a RoI seldom needs another number of steps than the one before it; an odd one is halved.
template <typename T>
struct RowPair {
  int64_t offset[2];
  T weight[2];
};

// For bin b of an axis and RoI i: entries [begin[b * (count + 1) + i], begin[.. + 1]), and what to divide by.
template <typename T>
struct BinIndex {
  Buffer<int64_t> begin;
  Buffer<T> divisor;
  int64_t count = 0, divisor_pitch = 0;

  void reserve(int64_t bins, int64_t rois) {
    count = rois;
    divisor_pitch = ceil_div(rois, int64_t(kRun<T>)) * kRun<T>;
    begin.reserve(bins * (count + 1));
    divisor.reserve(bins * divisor_pitch);
  }
  int64_t* begins(int64_t bin) { return begin.data() + bin * (count + 1); }
  const int64_t* begins(int64_t bin) const { return &begin[bin * (count + 1)]; }
  T* divisors(int64_t bin) { return divisor.data() + bin * divisor_pitch; }
  const T* divisors(int64_t bin) const { return &divisor[bin * divisor_pitch]; }
};

// The weights of some RoIs of one image. Rows are pairs; columns are runs of kRun neighbours, which end inside the row
// where it is as long.
template <typename T>
struct Taps {
  BinIndex<T> y, x;
  Buffer<RowPair<T>> rows;
  Buffer<int64_t> run_offset;
  Buffer<T> run_weight;
  int64_t first_row = 0, last_row = -1;  // of the map, that some RoI touches

  void build(const PsRoiParams& p, const Roi<T>* rois, const int64_t* order, int64_t count, int64_t row_stride) {
    int64_t most_pairs = 0, most_runs = 0;
    for (int64_t i = 0; i < count; ++i) {
      most_pairs += (most_taps(p, rois[order[i]].y, p.H) + 1) / 2;
      most_runs += min_of(most_taps(p, rois[order[i]].x, p.W), ceil_div(p.W, int64_t(kRun<T>)));
    }
    y.reserve(p.PH, count);
    x.reserve(p.PW, count);
    rows.reserve(p.PH * most_pairs);
    run_offset.reserve(p.PW * most_runs);
    run_weight.reserve(p.PW * most_runs * kRun<T>);
    Buffer<int64_t> low(p.PH), high(p.PH);
    constexpr int64_t kPieceWork = 512;
    parallel_for(p.PH + p.PW, ceil_div(kPieceWork, count + 1), [&](int64_t begin, int64_t end) {
      Buffer<T> line(max_of(p.H, p.W));
      for (int64_t i = 0; i < max_of(p.H, p.W); ++i) line[i] = T(0);
      for (int64_t b = begin; b < end; ++b) {
        if (b < p.PH) {
          build_rows(p, rois, order, b, b * most_pairs, row_stride, line.data(), low[b], high[b]);
        } else {
          build_runs(p, rois, order, b - p.PH, (b - p.PH) * most_runs, line.data());
        }
      }
    });
    first_row = p.H;
    for (int64_t b = 0; b < p.PH; ++b) {
      first_row = min_of(first_row, low[b]);
      last_row = max_of(last_row, high[b]);
    }
    if (last_row < first_row) first_row = last_row + 1;
  }

 private:
  // Calls emit(pixel, weight) for the pixels of a bin, ascending, each once. `line` is all zeros before and after.
  template <typename Emit>
  static void merge(const PsRoiParams& p, const RoiAxis<T>& axis, int64_t bin, int64_t size, T* line,
                    const Emit& emit) {
    int64_t first = size, last = -1;
    for_each_tap(p, axis, bin, size, [&](int64_t pixel, T weight) {
      if (weight == T(0)) return;
      line[pixel] += weight;
      first = min_of(first, pixel);
      last = max_of(last, pixel);
    });
    for (int64_t i = first; i <= last; ++i) {
      if (line[i] == T(0)) continue;
      emit(i, line[i]);
      line[i] = T(0);
    }
  }

  void build_rows(const PsRoiParams& p, const Roi<T>* rois, const int64_t* order, int64_t bin, int64_t next,
                  int64_t stride, T* line, int64_t& first, int64_t& last) {
    first = p.H;
    last = -1;
    for (int64_t i = 0; i < y.count; ++i) {
      const RoiAxis<T>& axis = rois[order[i]].y;
      y.begins(bin)[i] = next;
      y.divisors(bin)[i] = divisor_of(p, axis, bin, p.H);
      bool half = false;
      merge(p, axis, bin, p.H, line, [&](int64_t row, T weight) {
        RowPair<T>& pair = rows[half ? next - 1 : next++];
        pair.offset[half] = row * stride;
        pair.weight[half] = weight;
        half = !half;
        first = min_of(first, row);
        last = max_of(last, row);
      });
      if (half) {
        RowPair<T>& pair = rows[next - 1];
        pair.offset[1] = pair.offset[0];
        pair.weight[0] = pair.weight[1] = pair.weight[0] / T(2);
      }
    }
    y.begins(bin)[y.count] = next;
    for (int64_t i = y.count; i < y.divisor_pitch; ++i) y.divisors(bin)[i] = T(1);
  }

  void build_runs(const PsRoiParams& p, const Roi<T>* rois, const int64_t* order, int64_t bin, int64_t next, T* line) {
    for (int64_t i = 0; i < x.count; ++i) {
      const RoiAxis<T>& axis = rois[order[i]].x;
      const int64_t first = x.begins(bin)[i] = next;
      x.divisors(bin)[i] = divisor_of(p, axis, bin, p.W);
      merge(p, axis, bin, p.W, line, [&](int64_t column, T weight) {
        if (next == first || column >= run_offset[next - 1] + kRun<T>) {
          run_offset[next] = min_of(column, max_of(p.W - kRun<T>, int64_t(0)));
          store_run<T>(run_weight.data() + next * kRun<T>, Run<T>{});
          ++next;
        }
        run_weight[(next - 1) * kRun<T> + column - run_offset[next - 1]] = weight;
      });
    }
    x.begins(bin)[x.count] = next;
    for (int64_t i = x.count; i < x.divisor_pitch; ++i) x.divisors(bin)[i] = T(1);
  }
};

template <typename T>
void fill_zeros(T* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = T(0);
}

// The plane that comes next, fetched a few lines at each step: RoIs read it in no order that the hardware foresees.
struct Fetch {
  const char* next = nullptr;
  const char* end = nullptr;
  int64_t lines = 0;

  PVK_INLINE void step() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += kLine) __builtin_prefetch(next);
  }
  static constexpr int64_t kLine = 64;
};

// A few RoIs read too little of a plane for it to be worth fetching.
template <typename T>
Fetch plan_fetch(const T* data, int64_t count, int64_t steps) {
  constexpr int64_t kMostLines = 16;
  const char* first = reinterpret_cast<const char*>(data);
  const int64_t bytes = count * int64_t(sizeof(T));
  const int64_t lines = ceil_div(ceil_div(bytes, Fetch::kLine), steps);
  return lines > kMostLines ? Fetch{} : Fetch{first, first + bytes, lines};
}

// bins[i - begin] = bin (ph, pw) of RoIs [begin, end) from their plane; `begin` and the room in bins are multiples of
// kRun.
template <typename T>
void pool_plane(const T* plane, const Taps<T>& taps, int64_t ph, int64_t pw, int64_t begin, int64_t end, T* bins,
                Fetch ahead) {
  const int64_t* row_begin = taps.y.begins(ph);
  const int64_t* run_begin = taps.x.begins(pw);
  for (int64_t first = begin; first < end; first += kRun<T>) {
    ahead.step();
    Run<T> parts[kRun<T>];
#pragma GCC unroll 8
    for (int j = 0; j < kRun<T>; ++j) {
      const int64_t i = min_of(first + j, end - 1);
      parts[j] = Run<T>{};
      for (int64_t run = run_begin[i]; run < run_begin[i + 1]; ++run) {
        const T* columns = plane + taps.run_offset[run];
        Run<T> sum{};
        for (int64_t r = row_begin[i]; r < row_begin[i + 1]; ++r) {
          const RowPair<T>& pair = taps.rows[r];
          sum = multiply_add<T>(load_run(columns + pair.offset[0]), pair.weight[0] - Run<T>{}, sum);
          sum = multiply_add<T>(load_run(columns + pair.offset[1]), pair.weight[1] - Run<T>{}, sum);
        }
        parts[j] += weighted<T>(sum, load_run(&taps.run_weight[run * kRun<T>]));
      }
    }
    const Run<T> divisor = load_run(taps.y.divisors(ph) + first) * load_run(taps.x.divisors(pw) + first);
    store_run<T>(bins + first - begin, sum_across<T>(parts) / divisor);
  }
}

// Adds the gradients of bin (ph, pw) of RoIs [begin, end), ascending, to the gradient of their plane.
template <typename T>
void scatter_plane(T* plane, const Taps<T>& taps, int64_t ph, int64_t pw, int64_t begin, int64_t end, const T* bins) {
  const int64_t* row_begin = taps.y.begins(ph);
  const int64_t* run_begin = taps.x.begins(pw);
  for (int64_t first = begin; first < end; first += kRun<T>) {
    const Run<T> divisor = load_run(taps.y.divisors(ph) + first) * load_run(taps.x.divisors(pw) + first);
    T gradient[kRun<T>];
    store_run<T>(gradient, load_run(bins + first - begin) / divisor);
    for (int64_t i = first; i < min_of(first + kRun<T>, end); ++i) {
      for (int64_t run = run_begin[i]; run < run_begin[i + 1]; ++run) {
        T* columns = plane + taps.run_offset[run];
        const Run<T> value = weighted<T>(gradient[i - first] - Run<T>{}, load_run(&taps.run_weight[run * kRun<T>]));
        for (int64_t r = row_begin[i]; r < row_begin[i + 1]; ++r) {
          const RowPair<T>& pair = taps.rows[r];
          for (int half = 0; half < 2; ++half) {
            T* target = columns + pair.offset[half];
            store_run<T>(target, multiply_add<T>(value, pair.weight[half] - Run<T>{}, load_run(target)));
          }
        }
      }
    }
  }
}

}  // namespace PVK_ISA
}  // namespace pvk::ps_roi_align
