// The gradient of average pooling of planes on the CPU.
//
// A task owns a band of rows of a plane's gradient, which is made in a buffer and then copied out. First the gradients
// of the outputs above and below each row are added and divided; then each pixel takes the sums of the outputs beside
// it. Rows under the same outputs are equal.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/pool_lanes.h"
#include "core/stream.h"
#include "ops/avg_pool2d/cpu_kernels.h"

namespace pvk::avg_pool2d::PVK_ISA {
namespace {

constexpr int64_t kBandElements = 2048;
constexpr int64_t kLine = 64;
constexpr int64_t kMostOverlap = 4;

// How the sums of a row's outputs become its pixels.
enum class Spread {
  kSteps,   // stride 1: registers of neighbours are added
  kPhases,  // stride 2: as kSteps for even and for odd places
  kFills,   // few windows meet in a pixel: each written in registers, those that meet in rows that are added
  kLoops,
};

template <typename scalar_t>
struct RowSpread {
  using T = opmath_t<scalar_t>;
  static constexpr int64_t kLane = kLanes<T>;
  const PoolAxis& axis;
  Spread kind;
  int64_t taps, zeros, pitch;  // of the sums: zeros before the first, elements of a row
  int64_t overlap = 0, phase;  // windows that meet in a pixel; elements of a phase, of a row of fills
  Buffer<PoolRange> windows;

  RowSpread(const AvgPool2dParams& p, const RowPlan& plan) : axis(p.columns), windows(p.columns.outputs) {
    for (int64_t o = 0; o < axis.outputs; ++o) windows[o] = axis.window(o);
    for (int64_t x = 0; x < axis.size; ++x) {
      const PoolRange range = axis.outputs_of(x);
      overlap = max_of(overlap, range.end - range.begin);
    }
    kind = overlap <= kMostOverlap ? Spread::kFills : Spread::kLoops;
    if (plan.phased) kind = axis.stride == 1 ? Spread::kSteps : Spread::kPhases;
    taps = axis.kernel;
    zeros = plan.phased ? ceil_div(axis.kernel, kLane) * kLane : 0;
    phase = ceil_div(axis.size + 2 * kLane + axis.padding, kLane) * kLane;
    pitch = zeros + ceil_div(max_of(axis.outputs, plan.phased ? phase : 0) + kLane, kLane) * kLane;
  }

  int64_t scratch() const { return max_of<int64_t>(2, overlap) * phase; }

  // Sums of neighbours: to[i] = sum of from[i - j], j below count, which is kCount where that is not 0.
  template <int kCount, typename target_t>
  PVK_INLINE static void add_steps(const T* from, int64_t count, int64_t elements, target_t* to) {
    for (int64_t i = 0; i < elements; i += kLane) {
      Vec<T> sum = load(from + i);
#pragma GCC unroll 4
      for (int64_t j = 1; j < (kCount > 0 ? kCount : count); ++j) sum += load(from + i - j);
      store(to + i, sum);
    }
  }

  // Windows o, o + overlap, ... with zeros between and after them: none of these meet.
  PVK_INLINE void fill_windows(const T* sums, int64_t first, T* to) const {
    int64_t x = 0;
    for (int64_t o = first; o < axis.outputs; o += overlap) {
      for (; x < windows[o].begin; x += kLane) store(to + x, Vec<T>{});
      for (x = windows[o].begin; x < windows[o].end; x += kLane) store(to + x, splat(sums[o]));
      x = windows[o].end;
    }
    for (; x < axis.size; x += kLane) store(to + x, Vec<T>{});
  }

  // A register beyond the row's end may be written.
  PVK_INLINE void run(const T* sums, T* scratch, scalar_t* row) const {
    const int64_t W = axis.size;
    if (kind == Spread::kSteps) {
      const T* const from = sums + axis.padding;
      if (taps == 3) {
        add_steps<3>(from, taps, W, row);
      } else {
        add_steps<0>(from, taps, W, row);
      }
    } else if (kind == Spread::kPhases) {
      const int64_t padding = axis.padding, elements = (W - 1 + padding) / 2 + 1;
      add_steps<0>(sums, (taps + 1) / 2, elements, scratch);
      if (taps > 1) add_steps<0>(sums, taps / 2, elements, scratch + phase);
      if (taps == 1) fill(scratch + phase, elements, T(0));
      const T* const even = scratch + (padding & 1) * phase + padding / 2;
      const T* const odd = scratch + ((padding + 1) & 1) * phase + (padding + 1) / 2;
      for (int64_t x = 0; x < W; x += 2 * kLane) {
        if constexpr (kSplitsPairs<scalar_t>) {
          store_elements(row + x, Pair<T>(load(even + x / 2), load(odd + x / 2)), kPair<scalar_t>);
          continue;
        }
        Vec<T> low, high;
        interleave<T>(load(even + x / 2), load(odd + x / 2), low, high);
        store(row + x, low);
        if (x + kLane < W) store(row + x + kLane, high);
      }
    } else if (kind == Spread::kFills) {
      for (int64_t i = 0; i < overlap; ++i) fill_windows(sums, i, scratch + i * phase);
      for (int64_t x = 0; x < W; x += kLane) {
        Vec<T> sum{};
        for (int64_t i = 0; i < overlap; ++i) sum += load(scratch + i * phase + x);
        store(row + x, sum);
      }
    } else {
      fill(scratch, W, T(0));
      for (int64_t o = 0; o < axis.outputs; ++o)
        for (int64_t x = windows[o].begin; x < windows[o].end; ++x) scratch[x] += sums[o];
      for (int64_t x = 0; x < W; x += kLane) store(row + x, load(scratch + x));
    }
  }
};

// One window for a whole plane: its gradient for every pixel.
template <typename scalar_t>
void spread_global(const AvgPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t count = p.columns.size;
  const T divisor = T(p.divisor_of(p.rows, true, 0)) * T(p.divisor_of(p.columns, false, 0));
  parallel_for(p.N * p.C, max_of<int64_t>(1, kPiece / count), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const scalar_t value = from_float<scalar_t>(T(to_float(static_cast<const scalar_t*>(p.pooled)[plane])) / divisor);
      fill(static_cast<scalar_t*>(p.map) + plane * count, count, value);
    }
  });
}

// Disjoint windows of 2 x 2 that begin with the map: each gradient for four pixels.
template <typename scalar_t>
void spread_halved(const AvgPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t H = p.rows.size, W = p.columns.size, OH = p.rows.outputs, OW = p.columns.outputs;
  Buffer<T> divisors(ceil_div(OW, kLane) * kLane);
  column_divisors(p, 1, ceil_div(OW, kLane) * kLane, divisors.data());
  parallel_for(p.N * p.C, max_of<int64_t>(1, kPiece / (H * W)), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + plane * OH * OW;
      scalar_t* const target = static_cast<scalar_t*>(p.map) + plane * H * W;
      for (int64_t y = 0; y < H; y += 2) {
        const int64_t oh = y / 2, rows = min_of(H - y, int64_t(2));
        const T row_divisor = oh < OH ? T(p.divisor_of(p.rows, true, oh)) : T(1);
        for (int64_t i = 0; 2 * i < W; i += kLane) {
          Vec<T> value{}, low, high;
          if (oh < OH && i < OW) value = load_some(grad + oh * OW + i, OW - i) / (load(&divisors[i]) * row_divisor);
          interleave<T>(value, value, low, high);
          for (int64_t r = 0; r < rows; ++r) {
            scalar_t* const to = target + (y + r) * W + 2 * i;
            if constexpr (kSplitsPairs<scalar_t>) {
              store_elements(to, Pair<T>(value, value), min_of<int64_t>(W - 2 * i, kPair<scalar_t>));
              continue;
            }
            store_some(to, low, W - 2 * i);
            if (W - 2 * i > kLane) store_some(to + kLane, high, W - 2 * i - kLane);
          }
        }
      }
    }
  });
}

// The reciprocals of the divisors of a row of outputs.
template <typename T>
struct Reciprocals {
  const Buffer<T>&divisors, &row_divisors;
  Buffer<T> values;
  T of = 0;  // the row's divisor

  Reciprocals(const Buffer<T>& columns, const Buffer<T>& rows, int64_t count)
      : divisors(columns), row_divisors(rows), values(count) {}

  PVK_INLINE const T* row(int64_t oh, int64_t outputs) {
    if (row_divisors[oh] == of) return values.data();
    of = row_divisors[oh];
    for (int64_t i = 0; i < outputs; i += kLanes<T>) store(&values[i], T(1) / (load(&divisors[i]) * of));
    return values.data();
  }
};

// The gradients of a range of rows of outputs, each divided as its window was, and added.
template <typename scalar_t, typename T>
PVK_INLINE void add_outputs(const scalar_t* grad, const PoolRange& range, int64_t OW, Reciprocals<T>& reciprocals,
                            T* sums) {
  constexpr int64_t kLane = kLanes<T>;
  bool is_first = true;
  if (range.begin >= range.end) fill(sums, OW, T(0));
  for (int64_t begin = range.begin, end; begin < range.end; begin = end, is_first = false) {
    const T* const factors = reciprocals.row(begin, OW);
    end = begin + 1;
    while (end < range.end && reciprocals.row_divisors[end] == reciprocals.of) ++end;
    const auto add = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
      Vec<T> sum = load_some(grad + begin * OW + i, lanes);
      for (int64_t oh = begin + 1; oh < end; ++oh) sum += load_some(grad + oh * OW + i, lanes);
      sum *= load(factors + i);
      store_some(sums + i, is_first ? sum : sum + load_some(sums + i, lanes), lanes);
    };
    int64_t i = 0;
    for (; i + kLane <= OW; i += kLane) add(i, kLane);
    if (i < OW) add(i, OW - i);
  }
}

template <typename scalar_t>
void spread(const AvgPool2dParams& given) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const AvgPool2dParams p = with_joined_rows(given);
  const int64_t H = p.rows.size, W = p.columns.size, OH = p.rows.outputs, OW = p.columns.outputs;
  if (OH == 0 || OW == 0) {
    fill(static_cast<scalar_t*>(p.map), p.N * p.C * H * W, scalar_t{});
    return;
  }
  if (H == 1 && covers_the_map(p.rows) && covers_the_map(p.columns)) return spread_global<scalar_t>(p);
  if (p.rows.kernel == 2 && p.columns.kernel == 2 && p.rows.stride == 2 && p.columns.stride == 2 &&
      p.rows.padding == 0 && p.columns.padding == 0)
    return spread_halved<scalar_t>(p);
  const RowSpread<scalar_t> along(p, plan_row<T>(p.rows, p.columns, 1));
  const int64_t divided = ceil_div(OW, kLane) * kLane;
  Buffer<T> divisors(divided), row_divisors(OH);
  Buffer<PoolRange> ranges(H);
  column_divisors(p, 1, divided, divisors.data());
  for (int64_t o = 0; o < OH; ++o) row_divisors[o] = T(p.divisor_of(p.rows, true, o));
  for (int64_t y = 0; y < H; ++y) ranges[y] = p.rows.outputs_of(y);
  const int64_t band = min_of(H, max_of<int64_t>(1, kBandElements / W)), bands = ceil_div(H, band);
  const bool past = goes_past_caches(p.N * p.C * H * W * int64_t(sizeof(scalar_t)));
  parallel_for(p.N * p.C * bands, max_of<int64_t>(1, kPiece / (band * W)), [&](int64_t begin, int64_t end) {
    Buffer<T> sums(band * along.pitch), scratch(along.scratch());
    Buffer<scalar_t> buffer(band * W + 2 * kLane + kLine);
    Reciprocals<T> reciprocals(divisors, row_divisors, divided);
    fill(sums.data(), band * along.pitch, T(0));
    const auto repeats = [&](int64_t first, int64_t y) {
      return y > first && ranges[y].begin == ranges[y - 1].begin && ranges[y].end == ranges[y - 1].end;
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, first = task % bands * band, last = min_of(first + band, H);
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + plane * OH * OW;
      scalar_t* const target = static_cast<scalar_t*>(p.map) + (plane * H + first) * W;
      T* row_sums = sums.data() + along.zeros;
      for (int64_t y = first; y < last; ++y) {
        if (repeats(first, y)) continue;
        add_outputs(grad, ranges[y], OW, reciprocals, row_sums);
        row_sums += along.pitch;
      }
      row_sums = sums.data() + along.zeros;
      // As far from a cache line's begin as the target. Rows that may be written beyond their end go there directly.
      scalar_t* const made = buffer.data() + reinterpret_cast<uintptr_t>(target) % 64 / sizeof(scalar_t);
      const int64_t direct = past ? 0 : (last - first) - ceil_div(2 * kLane, W);
      const scalar_t* made_last = nullptr;
      for (int64_t y = first; y < last; ++y) {
        scalar_t* const row = (y - first < direct ? target : made) + (y - first) * W;
        if (repeats(first, y)) {
          for (int64_t x = 0; x < W; x += kLane) {
            scalar_t part[kLane];  // the rows meet where they are shorter
            std::memcpy(part, made_last + x, sizeof(part));
            std::memcpy(row + x, part, sizeof(part));
          }
          continue;
        }
        along.run(row_sums, scratch.data(), row);
        made_last = row;
        row_sums += along.pitch;
      }
      const int64_t done = max_of<int64_t>(direct, 0) * W;
      copy_out(target + done, made + done, ((last - first) * W - done) * int64_t(sizeof(scalar_t)), past);
    }
    if (past) end_of_streams();
  });
}

}  // namespace

void backward_planes(const AvgPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { spread<decltype(scalar)>(p); });
}

}  // namespace pvk::avg_pool2d::PVK_ISA
