// Average pooling of planes on the CPU, and of channels_last maps with few channels: registers along rows.
//
// A task owns a band of output rows of a plane. An input row is summed along itself once, to as many sums as the output
// has, and a window's rows are added.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "ops/avg_pool2d/cpu_kernels.h"

namespace pvk::avg_pool2d::PVK_ISA {
namespace {

constexpr int64_t kBandElements = 1 << 16;  // of the map, of a task

template <typename scalar_t>
struct Planes {
  const AvgPool2dParams& p;
  int64_t group, band, bands, a_row;

  Planes(const AvgPool2dParams& params, const RowPlan& plan) : p(params), group(plan.group) {
    a_row = max_of<int64_t>(1, plan.columns * p.rows.size / p.rows.outputs);
    band = min_of(max_of<int64_t>(1, kBandElements / a_row), p.rows.outputs);
    bands = ceil_div(p.rows.outputs, band);
  }

  int64_t count() const { return p.N * (group == 1 ? p.C : 1) * bands; }
  int64_t chunk() const { return max_of<int64_t>(1, kPiece / max_of<int64_t>(1, band * a_row)); }

  // body(map's plane, output's plane, first output row, last)
  template <typename Body>
  PVK_INLINE void run(int64_t task, const Body& body) const {
    const int64_t plane = task / bands, first = task % bands * band;
    const int64_t n = group == 1 ? plane / p.C : plane, c = group == 1 ? plane % p.C : 0;
    body(static_cast<const scalar_t*>(p.map) + n * p.map_stride[0] + c * p.map_stride[1],
         static_cast<scalar_t*>(p.pooled) + n * p.pooled_stride[0] + c * p.pooled_stride[1], first,
         min_of(first + band, p.rows.outputs));
  }
};

// Small windows: from the rows themselves.
template <int K, int S, typename scalar_t>
void pool_small(const AvgPool2dParams& p, const RowPlan& plan) {
  using T = opmath_t<scalar_t>;
  const Planes<scalar_t> planes(p, plan);
  Buffer<T> divisors(plan.pitch);
  column_divisors(p, 1, plan.pitch, divisors.data());
  Buffer<PoolRange> windows(p.rows.outputs);
  Buffer<T> row_divisors(p.rows.outputs);
  for (int64_t o = 0; o < p.rows.outputs; ++o) {
    windows[o] = p.rows.window(o);
    row_divisors[o] = T(p.divisor_of(p.rows, true, o));
  }
  Buffer<TapMasks> masks(plan.pitch / kLanes<T>);
  for (int64_t i = 0; i < plan.pitch; i += kLanes<T>)
    masks[i / kLanes<T>] = tap_masks<K, S, T>(i * S - p.columns.padding, p.columns.size);
  parallel_for(planes.count(), planes.chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      planes.run(task, [&](const scalar_t* map, scalar_t* output, int64_t first, int64_t last) {
        for (int64_t oh = first; oh < last; ++oh) {
          const PoolRange window = windows[oh];
          const T row_divisor = row_divisors[oh];
          for (int64_t i = 0; i < plan.outputs; i += kLanes<T>) {
            Vec<T> sum{};
            for (int64_t y = window.begin; y < window.end; ++y) {
              Vec<T> taps[K];
              load_taps<K, S, scalar_t, T>(map + y * p.map_stride[2] + i * S - p.columns.padding, masks[i / kLanes<T>],
                                           Vec<T>{}, taps);
              Vec<T> row = taps[0] + taps[1];
              if constexpr (K == 3) row += taps[2];
              sum += row;
            }
            store_some(output + oh * p.pooled_stride[2] + i, sum / (load(&divisors[i]) * row_divisor),
                       plan.outputs - i);
          }
        }
      });
    }
  });
}

template <typename scalar_t>
void pool_phased(const AvgPool2dParams& p, const RowPlan& plan) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const Planes<scalar_t> planes(p, plan);
  const int64_t ring = min_of(p.rows.kernel, p.rows.size);
  Buffer<T> divisors(plan.pitch);
  column_divisors(p, plan.group, plan.pitch, divisors.data());
  parallel_for(planes.count(), planes.chunk(), [&](int64_t begin, int64_t end) {
    Buffer<T> phases(plan.phase_size), sums(ring * plan.pitch);
    int64_t held[kMostReach];  // which row each slot of the ring has
    fill(phases.data(), plan.phase_size, T(0));
    for (int64_t task = begin; task < end; ++task) {
      fill(held, ring, int64_t(-1));
      planes.run(task, [&](const scalar_t* map, scalar_t* output, int64_t first, int64_t last) {
        for (int64_t oh = first; oh < last; ++oh) {
          const PoolRange window = p.rows.window(oh);
          int64_t slots[kMostReach];
          int count = 0;
          for (int64_t y = window.begin; y < window.end; ++y) {
            const int64_t slot = y % ring;
            slots[count++] = slot * plan.pitch;
            if (held[slot] == y) continue;
            held[slot] = y;
            copy_to_phases<scalar_t, T>(plan, p.columns, map + y * p.map_stride[2], phases.data());
            for (int64_t i = 0; i < plan.pitch; i += kLane) {
              Vec<T> sum = load(phases.data() + plan.tap_place[0] + i);
              for (int64_t k = 1; k < plan.taps; ++k) sum += load(phases.data() + plan.tap_place[k] + i);
              store(&sums[slot * plan.pitch + i], sum);
            }
          }
          const T row_divisor = T(p.divisor_of(p.rows, true, oh));
          scalar_t* const to = output + oh * p.pooled_stride[2];
          for (int64_t i = 0; i < plan.outputs; i += kLane) {
            Vec<T> sum{};
            for (int k = 0; k < count; ++k) sum += load(&sums[slots[k] + i]);
            store_some(to + i, sum / (load(&divisors[i]) * row_divisor), plan.outputs - i);
          }
        }
      });
    }
  });
}

// Wide or uneven windows of groups.
template <typename scalar_t>
void pool_groups(const AvgPool2dParams& p, const RowPlan& plan) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>, kBlock = 32;
  const Planes<scalar_t> planes(p, plan);
  const int64_t G = plan.group;
  Buffer<PoolRange> windows(p.columns.outputs);
  Buffer<T> divisors(plan.pitch);
  for (int64_t o = 0; o < p.columns.outputs; ++o) windows[o] = p.columns.window(o);
  column_divisors(p, G, plan.pitch, divisors.data());
  parallel_for(planes.count(), planes.chunk(), [&](int64_t begin, int64_t end) {
    Buffer<T> sums(ceil_div(plan.columns, kLane) * kLane);
    for (int64_t task = begin; task < end; ++task) {
      planes.run(task, [&](const scalar_t* map, scalar_t* output, int64_t first, int64_t last) {
        for (int64_t oh = first; oh < last; ++oh) {
          const PoolRange rows = p.rows.window(oh);
          for (int64_t i = 0; i < plan.columns; i += kLane) {
            Vec<T> sum{};
            for (int64_t y = rows.begin; y < rows.end;) {
              Vec<T> block{};
              for (const int64_t stop = min_of(y + kBlock, rows.end); y < stop; ++y)
                block += load_some(map + y * p.map_stride[2] + i, plan.columns - i);
              sum += block;
            }
            store(&sums[i], sum);
          }
          const T row_divisor = T(p.divisor_of(p.rows, true, oh));
          scalar_t* const to = output + oh * p.pooled_stride[2];
          for (int64_t o = 0; o < p.columns.outputs; ++o)
            for (int64_t c = 0; c < G; ++c) {
              T sum = 0;
              for (int64_t x = windows[o].begin; x < windows[o].end; ++x) sum += sums[x * G + c];
              to[o * G + c] = from_float<scalar_t>(sum / (divisors[o * G] * row_divisor));
            }
        }
      });
    }
  });
}

template <typename scalar_t>
void pool_rows(const AvgPool2dParams& given) {
  AvgPool2dParams p = with_joined_rows(given);
  const RowPlan plan = plan_row<opmath_t<scalar_t>>(p.rows, p.columns, p.channels_last ? p.C : 1);
  if (plan.group == 1 && (!plan.phased || (p.rows.outputs == 1 && p.columns.outputs == 1))) return forward_windows(p);
  if (!plan.phased) return pool_groups<scalar_t>(p, plan);
  switch (has_small_windows(p.rows, p.columns, plan.group) ? p.columns.kernel * 2 + p.columns.stride - 1 : 0) {
    case 4:
      return pool_small<2, 1, scalar_t>(p, plan);
    case 5:
      return pool_small<2, 2, scalar_t>(p, plan);
    case 6:
      return pool_small<3, 1, scalar_t>(p, plan);
    case 7:
      return pool_small<3, 2, scalar_t>(p, plan);
    default:
      return pool_phased<scalar_t>(p, plan);
  }
}

}  // namespace

void forward_rows(const AvgPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { pool_rows<decltype(scalar)>(p); });
}

}  // namespace pvk::avg_pool2d::PVK_ISA
