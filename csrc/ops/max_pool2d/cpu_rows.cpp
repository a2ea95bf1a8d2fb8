// Max pooling of planes on the CPU, and of channels_last maps with few channels: registers along rows.
//
// A task owns a band of output rows of a plane. An input row is reduced along itself once, to as many values as the
// output has, and a window's rows are compared in their order: so the first of equal values wins, and the last NaN,
// as in a loop over the window's pixels. Wide or uneven windows are reduced down first, and then along the row.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/pool_taps.h"
#include "ops/max_pool2d/cpu_kernels.h"

namespace pvk::max_pool2d::PVK_ISA {
namespace {

constexpr int64_t kPiece = 16384;           // elements of the map that a thread gets at least
constexpr int64_t kBandElements = 1 << 16;  // of the map, of a task

template <typename scalar_t>
struct Planes {
  using T = opmath_t<scalar_t>;
  const MaxPool2dParams& p;
  const RowPlan& plan;
  int64_t band, bands;  // output rows of a task; tasks of a plane

  Planes(const MaxPool2dParams& params, const RowPlan& row_plan) : p(params), plan(row_plan) {
    const int64_t a_row = max_of<int64_t>(1, plan.columns * p.rows.size / max_of<int64_t>(1, p.rows.outputs));
    band = min_of(max_of<int64_t>(1, kBandElements / a_row), p.rows.outputs);
    bands = ceil_div(p.rows.outputs, band);
  }

  int64_t count() const { return p.N * (plan.group == 1 ? p.C : 1) * bands; }
  int64_t chunk() const {
    const int64_t work = band * plan.columns * p.rows.size / max_of<int64_t>(1, p.rows.outputs);
    return max_of<int64_t>(1, kPiece / max_of<int64_t>(1, work));
  }

  // body(map's plane, output's plane, places' plane, first output row, last)
  template <typename Body>
  PVK_INLINE void run(int64_t task, const Body& body) const {
    const int64_t plane = task / bands, first = task % bands * band;
    const int64_t n = plan.group == 1 ? plane / p.C : plane, c = plan.group == 1 ? plane % p.C : 0;
    const int64_t pooled = n * p.pooled_stride[0] + c * p.pooled_stride[1];
    body(static_cast<const scalar_t*>(p.map) + n * p.map_stride[0] + c * p.map_stride[1],
         static_cast<scalar_t*>(p.pooled) + pooled, p.places == nullptr ? nullptr : p.places + pooled, first,
         min_of(first + band, p.rows.outputs));
  }
};

// A window without a pixel, which dilation may leave: minus infinity and no place.
template <typename scalar_t>
void write_no_maximum(scalar_t* output, int32_t* places, int64_t count) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < count; ++i) {
    output[i] = from_float<scalar_t>(T(-__builtin_inf()));
    if (places != nullptr) places[i] = -1;
  }
}

// Where the taps of each output begin, the first that is in the map, and whether all windows have one.
template <typename T>
struct Columns {
  Buffer<place_t<T>> begin, first;
  bool all = true;

  Columns(const MaxPool2dParams& p, const RowPlan& plan) : begin(plan.pitch), first(plan.pitch) {
    for (int64_t i = 0; i < plan.pitch; ++i) {
      const int64_t o = min_of(i / plan.group, p.columns.outputs - 1);
      const PoolRange window = p.columns.window(o);
      begin[i] = place_t<T>(o * p.columns.stride - p.columns.padding);
      first[i] = place_t<T>(window.begin);
      all = all && window.begin < window.end;
    }
  }
};

// The maxima of each output's taps along a row.
template <bool kPlaces, typename T>
PVK_INLINE void reduce_along(const RowPlan& plan, const T* phases, Columns<T>& columns, int64_t dilation,
                             place_t<T> start, T* values, place_t<T>* places) {
  for (int64_t i = 0; i < plan.pitch; i += kLanes<T>) {
    Vec<T> best = splat(T(-__builtin_inf()));
    Mask<T> place{}, begin{};
    if constexpr (kPlaces) {
      place = load_mask<T>(&columns.first[i]) + start;
      begin = load_mask<T>(&columns.begin[i]) + start;
    }
    for (int64_t k = 0; k < plan.taps; ++k) {
      take_larger<kPlaces>(best, place, load(phases + plan.tap_place[k] + i), begin);
      if constexpr (kPlaces) begin += place_t<T>(dilation);
    }
    store(values + i, best);
    if constexpr (kPlaces) store_mask<T>(places + i, place);
  }
}

template <bool kPlaces, typename scalar_t>
void pool_phased(const MaxPool2dParams& p, const RowPlan& plan) {
  using T = opmath_t<scalar_t>;
  using P = place_t<T>;
  const Planes<scalar_t> planes(p, plan);
  const int64_t W = p.columns.size;
  const int64_t ring = min_of((p.rows.kernel - 1) * p.rows.dilation + 1, p.rows.size);
  Columns<T> columns(p, plan);
  parallel_for(planes.count(), planes.chunk(), [&](int64_t begin, int64_t end) {
    Buffer<T> phases(plan.phase_size), values(ring * plan.pitch);
    Buffer<P> places(kPlaces ? ring * plan.pitch : 0);
    int64_t held[kMostReach];  // which row each slot of the ring has
    fill(phases.data(), plan.phase_size, T(-__builtin_inf()));
    for (int64_t task = begin; task < end; ++task) {
      fill(held, ring, int64_t(-1));
      planes.run(task, [&](const scalar_t* map, scalar_t* output, int32_t* out_places, int64_t first, int64_t last) {
        for (int64_t oh = first; oh < last; ++oh) {
          const PoolRange window = p.rows.window(oh);
          scalar_t* const to = output + oh * p.pooled_stride[2];
          int32_t* const to_places = kPlaces ? out_places + oh * p.pooled_stride[2] : nullptr;
          if (window.begin >= window.end) {
            write_no_maximum(to, to_places, plan.outputs);
            continue;
          }
          int64_t slots[kMostReach];
          int count = 0;
          for (int64_t y = window.begin; y < window.end; y += p.rows.dilation) {
            const int64_t slot = y % ring;
            slots[count++] = slot * plan.pitch;
            if (held[slot] == y) continue;
            held[slot] = y;
            copy_to_phases<scalar_t, T>(plan, p.columns, map + y * p.map_stride[2], phases.data());
            reduce_along<kPlaces, T>(plan, phases.data(), columns, p.columns.dilation, P(y * W),
                                     values.data() + slot * plan.pitch,
                                     kPlaces ? places.data() + slot * plan.pitch : nullptr);
          }
          for (int64_t i = 0; i < plan.outputs; i += kLanes<T>) {
            Vec<T> best = load(&values[slots[0] + i]);
            Mask<T> place{};
            if constexpr (kPlaces) place = load_mask<T>(&places[slots[0] + i]);
            for (int k = 1; k < count; ++k) {
              Mask<T> here{};
              if constexpr (kPlaces) here = load_mask<T>(&places[slots[k] + i]);
              take_larger<kPlaces>(best, place, load(&values[slots[k] + i]), here);
            }
            store_some(to + i, best, plan.outputs - i);
            if constexpr (kPlaces) store_places(to_places + i, place, plan.outputs - i);
          }
          if (kPlaces && !columns.all) {
            for (int64_t i = 0; i < plan.outputs; ++i)
              if (columns.first[i] >= P(W)) to_places[i] = -1;
          }
        }
      });
    }
  });
}

// ---- small windows: from the rows themselves ----

template <int K, int S, bool kPlaces, typename scalar_t>
void pool_small(const MaxPool2dParams& p, const RowPlan& plan) {
  using T = opmath_t<scalar_t>;
  using P = place_t<T>;
  const Planes<scalar_t> planes(p, plan);
  const int64_t W = p.columns.size;
  Columns<T> columns(p, plan);
  Buffer<PoolRange> windows(p.rows.outputs);
  for (int64_t o = 0; o < p.rows.outputs; ++o) windows[o] = p.rows.window(o);
  Buffer<TapMasks> masks(plan.pitch / kLanes<T>);
  for (int64_t i = 0; i < plan.pitch; i += kLanes<T>)
    masks[i / kLanes<T>] = tap_masks<K, S, T>(i * S - p.columns.padding, W);
  parallel_for(planes.count(), planes.chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      planes.run(task, [&](const scalar_t* map, scalar_t* output, int32_t* out_places, int64_t first, int64_t last) {
        for (int64_t oh = first; oh < last; ++oh) {
          const PoolRange window = windows[oh];
          for (int64_t i = 0; i < plan.outputs; i += kLanes<T>) {
            Vec<T> best = splat(T(-__builtin_inf()));
            Mask<T> place{}, begin_place{};
            if constexpr (kPlaces) {
              place = load_mask<T>(&columns.first[i]) + P(window.begin * W);
              begin_place = load_mask<T>(&columns.begin[i]) + P(window.begin * W);
            }
            const int64_t x = i * S - p.columns.padding;
            for (int64_t y = window.begin; y < window.end; ++y) {
              Vec<T> taps[K];
              load_taps<K, S, scalar_t, T>(map + y * p.map_stride[2] + x, masks[i / kLanes<T>],
                                           splat(T(-__builtin_inf())), taps);
#pragma GCC unroll 4
              for (int k = 0; k < K; ++k) take_larger<kPlaces>(best, place, taps[k], begin_place + P(k));
              if constexpr (kPlaces) begin_place += P(W);
            }
            store_some(output + oh * p.pooled_stride[2] + i, best, plan.outputs - i);
            if constexpr (kPlaces) store_places(out_places + oh * p.pooled_stride[2] + i, place, plan.outputs - i);
          }
        }
      });
    }
  });
}

// ---- wide or uneven windows of groups, or dilated ones ----

// Whether a value at a place comes before the best so far.
template <typename T>
PVK_INLINE bool precedes(T value, int64_t place, T best, int64_t best_place) {
  if (value != value) return best == best || place > best_place;
  return value > best || (value == best && place < best_place);
}

template <typename T>
struct Maximum {
  T value;
  int64_t place;
};

// The first maximum of values[0, step, ... below count); each has its place where kPlaces.
template <bool kPlaces, typename T>
PVK_INLINE Maximum<T> reduce_window(const T* values, const place_t<T>* places, int64_t count, int64_t step) {
  Maximum<T> best{values[0], kPlaces ? int64_t(places[0]) : 0};
  for (int64_t i = step; i < count; i += step) {
    const int64_t place = kPlaces ? int64_t(places[i]) : 0;
    if (precedes(values[i], place, best.value, best.place)) best = {values[i], place};
  }
  return best;
}

template <bool kPlaces, typename scalar_t>
void pool_groups(const MaxPool2dParams& p, const RowPlan& plan) {
  using T = opmath_t<scalar_t>;
  using P = place_t<T>;
  const Planes<scalar_t> planes(p, plan);
  const int64_t G = plan.group, W = p.columns.size, padded = ceil_div(plan.columns, int64_t(kLanes<T>)) * kLanes<T>;
  Buffer<PoolRange> windows(p.columns.outputs);
  for (int64_t o = 0; o < p.columns.outputs; ++o) windows[o] = p.columns.window(o);
  Buffer<P> column_of(padded);
  for (int64_t i = 0; i < padded; ++i) column_of[i] = P(i / G);
  parallel_for(planes.count(), planes.chunk(), [&](int64_t begin, int64_t end) {
    Buffer<T> values(padded);
    Buffer<P> places(kPlaces ? padded : 0);
    for (int64_t task = begin; task < end; ++task) {
      planes.run(task, [&](const scalar_t* map, scalar_t* output, int32_t* out_places, int64_t first, int64_t last) {
        for (int64_t oh = first; oh < last; ++oh) {
          const PoolRange rows = p.rows.window(oh);
          scalar_t* const to = output + oh * p.pooled_stride[2];
          int32_t* const to_places = kPlaces ? out_places + oh * p.pooled_stride[2] : nullptr;
          if (rows.begin >= rows.end) {
            write_no_maximum(to, to_places, plan.outputs);
            continue;
          }
          for (int64_t i = 0; i < plan.columns; i += kLanes<T>) {
            const scalar_t* from = map + rows.begin * p.map_stride[2] + i;
            Vec<T> best = load_some(from, plan.columns - i);
            Mask<T> place{}, here{};
            if constexpr (kPlaces) place = here = load_mask<T>(&column_of[i]) + P(rows.begin * W);
            for (int64_t y = rows.begin + p.rows.dilation; y < rows.end; y += p.rows.dilation) {
              from += p.rows.dilation * p.map_stride[2];
              if constexpr (kPlaces) here += P(p.rows.dilation * W);
              take_larger<kPlaces>(best, place, load_some(from, plan.columns - i), here);
            }
            store(&values[i], best);
            if constexpr (kPlaces) store_mask<T>(&places[i], place);
          }
          for (int64_t o = 0; o < p.columns.outputs; ++o) {
            const PoolRange window = windows[o];
            const int64_t count = (window.end - window.begin) * G;
            if (count <= 0) {
              write_no_maximum(to + o * G, kPlaces ? to_places + o * G : nullptr, G);
              continue;
            }
            for (int64_t c = 0; c < G; ++c) {
              const int64_t at = window.begin * G + c;
              const Maximum<T> best = reduce_window<kPlaces, T>(&values[at], kPlaces ? &places[at] : nullptr, count - c,
                                                                p.columns.dilation * G);
              to[o * G + c] = from_float<scalar_t>(best.value);
              if constexpr (kPlaces) to_places[o * G + c] = int32_t(best.place);
            }
          }
        }
      });
    }
  });
}

// As of all that the operator's arguments allow without dilation.
bool windows_have_pixels(const MaxPool2dParams& p) {
  for (const PoolAxis* axis = &p.rows;; axis = &p.columns) {
    const PoolRange first = axis->window(0), last = axis->window(axis->outputs - 1);
    if (first.begin >= first.end || last.begin >= last.end) return false;
    if (axis == &p.columns) return true;
  }
}

template <bool kPlaces, typename scalar_t>
void pool_rows(const MaxPool2dParams& given) {
  MaxPool2dParams p = given;
  make_plain(p.rows, p.columns);
  // The whole map in one window, where rows follow each other, is one row.
  if (covers_the_map(p.rows) && covers_the_map(p.columns) &&
      p.map_stride[2] == p.columns.size * (p.channels_last ? p.C : 1)) {
    p.columns = {p.rows.size * p.columns.size, 1, 0, 1, 0, 1};
    p.rows = {1, 1, 0, 1, 0, 1};
  }
  const RowPlan plan = plan_row<opmath_t<scalar_t>>(p.rows, p.columns, p.channels_last ? p.C : 1);
  if (plan.group == 1 && !plan.phased && p.columns.dilation == 1 && windows_have_pixels(p)) return forward_windows(p);
  if (!plan.phased) return pool_groups<kPlaces, scalar_t>(p, plan);
  const bool small = has_small_windows(p.rows, p.columns, plan.group) && windows_have_pixels(p);
  switch (small ? p.columns.kernel * 2 + p.columns.stride - 1 : 0) {
    case 4:
      return pool_small<2, 1, kPlaces, scalar_t>(p, plan);
    case 5:
      return pool_small<2, 2, kPlaces, scalar_t>(p, plan);
    case 6:
      return pool_small<3, 1, kPlaces, scalar_t>(p, plan);
    case 7:
      return pool_small<3, 2, kPlaces, scalar_t>(p, plan);
    default:
      return pool_phased<kPlaces, scalar_t>(p, plan);
  }
}

}  // namespace

void forward_rows(const MaxPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.places == nullptr) return pool_rows<false, scalar_t>(p);
    pool_rows<true, scalar_t>(p);
  });
}

}  // namespace pvk::max_pool2d::PVK_ISA
