// Max pooling of planes with wide or uneven windows on the CPU, adaptive ones and the whole map among them.
//
// A task is output rows. A window's rows are reduced down first, in registers; then each window along the row, to one
// register, and kLanes of these together to as many results. Columns are reduced before they meet: of equal values the
// one with the first place wins, of several NaN the one with the last.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/pool_lanes.h"
#include "ops/max_pool2d/cpu_kernels.h"

namespace pvk::max_pool2d::PVK_ISA {
namespace {

constexpr int64_t kPiece = 16384;     // elements of the map that a thread gets at least
constexpr int64_t kRows = 4;          // that are reduced down before along: stores have then left for the cache
constexpr int kNoPlace = 2147483647;  // beyond all places: of no value yet, or of minus infinity

// kLanes values and their places.
template <typename T>
struct Best {
  Vec<T> value;
  Mask<T> place;

  PVK_INLINE Best() : value(splat(T(-__builtin_inf()))), place(Mask<T>{} + place_t<T>(kNoPlace)) {}
  PVK_INLINE Best(Vec<T> value, Mask<T> place) : value(value), place(place) {}
};

template <bool kPlaces, typename T>
PVK_INLINE Best<T> merged(const Best<T>& a, const Best<T>& b) {
  Best<T> best = a;
  if constexpr (!kPlaces) {
    take_larger<false>(best.value, best.place, b.value, b.place);
  } else {
    const Mask<T> is_nan = b.value != b.value, earlier = b.place < a.place;
    const Mask<T> wins =
        (b.value > a.value) | ((b.value == a.value) & earlier) | (is_nan & ((a.value == a.value) | ~earlier));
    best.value = (Vec<T>)(((Mask<T>)b.value & wins) | ((Mask<T>)a.value & ~wins));
    best.place = (b.place & wins) | (a.place & ~wins);
  }
  return best;
}

// Lane i: the maximum of the lanes of register i.
template <bool kPlaces, int kRegisters, typename T>
PVK_INLINE Best<T> best_of_each(const T* values, const place_t<T>* places) {
  if constexpr (kRegisters == 1) {
    return {load(values), load_mask<T>(places)};
  } else {
    constexpr int kHalf = kRegisters / 2, kNext = kHalf * kLanes<T>;
    const Best<T> first = best_of_each<kPlaces, kHalf>(values, places);
    const Best<T> second = best_of_each<kPlaces, kHalf>(values + kNext, places + (kPlaces ? kNext : 0));
    Mask<T> even{}, odd{};
    if constexpr (kPlaces) {
      even = (Mask<T>)even_lanes<T>((Vec<T>)first.place, (Vec<T>)second.place);
      odd = (Mask<T>)odd_lanes<T>((Vec<T>)first.place, (Vec<T>)second.place);
    }
    return merged<kPlaces, T>({even_lanes<T>(first.value, second.value), even},
                              {odd_lanes<T>(first.value, second.value), odd});
  }
}

// Windows' maxima, each in a register, that become results which follow each other.
template <bool kPlaces, typename scalar_t>
struct Results {
  using T = opmath_t<scalar_t>;
  static constexpr int kLane = kLanes<T>;
  scalar_t* target;
  int32_t* target_places;
  int count = 0;
  alignas(64) T values[kLane * kLane] = {};
  alignas(64) place_t<T> places[kPlaces ? kLane * kLane : kLane] = {};
  alignas(64) place_t<T> first[kLane] = {};  // places: what minus infinity alone is found at

  Results(scalar_t* target, int32_t* target_places) : target(target), target_places(target_places) {}

  PVK_INLINE void add(const Best<T>& best, int64_t first_place) {
    store(values + count * kLane, best.value);
    if constexpr (kPlaces) {
      store_mask<T>(places + count * kLane, best.place);
      first[count] = place_t<T>(first_place);
    }
    if (++count == kLane) write();
  }
  PVK_INLINE void write() {
    const Best<T> best = best_of_each<kPlaces, kLane>(values, places);
    store_some(target, best.value, count);
    target += count;
    if constexpr (kPlaces) {
      const Mask<T> none = best.place == Mask<T>{} + place_t<T>(kNoPlace);
      store_places(target_places, (load_mask<T>(first) & none) | (best.place & ~none), count);
      target_places += count;
    }
    count = 0;
  }
};

template <bool kPlaces, typename scalar_t, typename T>
PVK_INLINE void take_pair(Best<T>& first, Best<T>& second, const scalar_t* from, int64_t elements, Mask<T> here) {
  const Pair<T> pair = load_elements(from, elements);
  take_larger<kPlaces>(first.value, first.place, pair.first, here);
  take_larger<kPlaces>(second.value, second.place, pair.second, here);
}

// The maxima of columns: kPairs pairs of registers, `in_last` elements of the last. Places are of the first column.
template <bool kPlaces, int kPairs, typename scalar_t, typename T>
void reduce_down(const scalar_t* from, int64_t stride, int64_t rows, int64_t in_last, Mask<T> here, place_t<T> row,
                 T* values, place_t<T>* places) {
  Best<T> best[2 * kPairs];
  for (int64_t y = 0; y < rows; ++y, from += stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i)
      take_pair<kPlaces>(best[2 * i], best[2 * i + 1], from + i * kPair<scalar_t>,
                         i + 1 == kPairs ? in_last : kPair<scalar_t>, here);
    if constexpr (kPlaces) here += row;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    store_in_order<scalar_t, T>(values + i * kPair<scalar_t>, {best[2 * i].value, best[2 * i + 1].value});
    if constexpr (kPlaces)
      store_in_order<scalar_t, T>(reinterpret_cast<T*>(places + i * kPair<scalar_t>),
                                  {(Vec<T>)best[2 * i].place, (Vec<T>)best[2 * i + 1].place});
  }
}

// In lanes from `count` on: of no value.
template <bool kPlaces, typename T>
PVK_INLINE Best<T> first_of_row(const T* values, const place_t<T>* places, Mask<T> column, int64_t count) {
  const Mask<T> lane = lane_numbers<T>(std::make_integer_sequence<int, kLanes<T>>{});
  const Mask<T> is_there = lane < Mask<T>{} + place_t<T>(count);
  const Best<T> none;
  Best<T> best;
  best.value = (Vec<T>)(((Mask<T>)load(values) & is_there) | ((Mask<T>)none.value & ~is_there));
  if constexpr (kPlaces) {
    const Mask<T> place = load_mask<T>(places), found = is_there & (place != none.place);
    best.place = ((place + column + lane) & found) | (none.place & ~found);
  }
  return best;
}

// The maximum of columns [begin, end), as a register. Whole registers may be read.
template <bool kPlaces, typename T>
PVK_INLINE Best<T> reduce_along(const T* values, const place_t<T>* places, int64_t begin, int64_t end) {
  constexpr int64_t kLane = kLanes<T>;
  const auto of = [&](int64_t x) __attribute__((always_inline)) {
    return first_of_row<kPlaces, T>(values + x, places + (kPlaces ? x : 0), Mask<T>{} + place_t<T>(x),
                                    min_of(end - x, kLane));
  };
  Best<T> best = of(begin);
  for (int64_t x = begin + kLane; x < end; x += kLane) best = merged<kPlaces, T>(best, of(x));
  return best;
}

// Minus infinity in the lanes from `count` on.
template <typename T>
PVK_INLINE Vec<T> keep_values(Vec<T> value, int64_t count) {
  const Mask<T> lane = lane_numbers<T>(std::make_integer_sequence<int, kLanes<T>>{});
  const Mask<T> is_there = lane < Mask<T>{} + place_t<T>(count);
  return (Vec<T>)(((Mask<T>)value & is_there) | ((Mask<T>)splat(T(-__builtin_inf())) & ~is_there));
}

// The maximum of `rows` rows of `count` elements, as a register, straight from the map.
template <bool kPlaces, typename scalar_t, typename T = opmath_t<scalar_t>>
PVK_INLINE Best<T> reduce_rows(const MaxPool2dParams& p, const scalar_t* from, int64_t rows, int64_t count,
                               int64_t first_place) {
  constexpr int64_t kWhole = kPair<scalar_t>;
  Best<T> best[4];
  for (int64_t y = 0; y < rows; ++y, from += p.rows.dilation * p.map_stride[2]) {
    Mask<T> here = Mask<T>{} + place_t<T>(first_place + y * p.rows.dilation * p.columns.size);
    int64_t x = 0;
    for (; x + 2 * kWhole <= count; x += 2 * kWhole) {
      take_pair<kPlaces>(best[0], best[1], from + x, kWhole, here);
      take_pair<kPlaces>(best[2], best[3], from + x + kWhole, kWhole, here);
      if constexpr (kPlaces) here += place_t<T>(2 * kWhole);
    }
    for (; x < count; x += kWhole) {
      const int64_t elements = min_of(count - x, kWhole), in_first = count_of_first<scalar_t>(elements);
      const Pair<T> pair = load_elements(from + x, elements);
      take_larger<kPlaces>(best[0].value, best[0].place, keep_values<T>(pair.first, in_first), here);
      take_larger<kPlaces>(best[1].value, best[1].place, keep_values<T>(pair.second, elements - in_first), here);
      if constexpr (kPlaces) here += place_t<T>(kWhole);
    }
  }
  if constexpr (kPlaces) {
    for (int i = 0; i < 4; ++i) {
      const Mask<T> element = elements_of_pair<scalar_t>(i % 2 == 1) + place_t<T>(i / 2 * kWhole);
      const Mask<T> none = best[i].place == Best<T>().place;
      best[i].place = ((best[i].place + element) & ~none) | (best[i].place & none);
    }
  }
  return merged<kPlaces, T>(merged<kPlaces, T>(best[0], best[1]), merged<kPlaces, T>(best[2], best[3]));
}

template <bool kPlaces, typename scalar_t>
void pool_windows(const MaxPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  using P = place_t<T>;
  constexpr int64_t kWhole = kPair<scalar_t>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs, W = p.columns.size, dilation = p.rows.dilation;
  const int64_t pitch = OW == 1 ? 0 : ceil_div(W, kWhole) * kWhole + kLanes<T>;  // windows are read in whole registers
  Buffer<PoolRange> windows(OW), row_windows(OH);
  for (int64_t o = 0; o < OW; ++o) windows[o] = p.columns.window(o);
  for (int64_t o = 0; o < OH; ++o) row_windows[o] = p.rows.window(o);
  const int64_t stride = p.map_stride[2], a_row = max_of<int64_t>(1, W * max_of<int64_t>(1, p.rows.size / OH));
  parallel_for(p.N * p.C * OH, max_of<int64_t>(1, kPiece / a_row), [&](int64_t begin, int64_t end) {
    Buffer<T> values(kRows * pitch);
    Buffer<P> places(kPlaces ? kRows * pitch : 0);
    fill(values.data(), kRows * pitch, T(0));
    if (kPlaces) fill(places.data(), kRows * pitch, P(0));
    Results<kPlaces, scalar_t> results(static_cast<scalar_t*>(p.pooled) + begin * OW,
                                       kPlaces ? p.places + begin * OW : nullptr);
    for (int64_t task = begin; task < end;) {
      const int64_t plane = task / OH, first = task % OH, last = min_of(min_of(first + kRows, OH), first + end - task);
      const scalar_t* const map =
          static_cast<const scalar_t*>(p.map) + plane / p.C * p.map_stride[0] + plane % p.C * p.map_stride[1];
      task += last - first;
      for (int64_t oh = first; oh < last; ++oh) {
        const PoolRange rows = row_windows[oh];
        const int64_t count = ceil_div(rows.end - rows.begin, dilation), place = rows.begin * W;
        const scalar_t* const from = map + rows.begin * stride;
        if (OW == 1) {
          const int64_t x = windows[0].begin;
          results.add(reduce_rows<kPlaces>(p, from + x, count, windows[0].end - x, place + x), place + x);
          continue;
        }
        const int64_t at = (oh - first) * pitch;
        for (int64_t i = 0; i < W; i += 2 * kWhole) {
          const bool both = W - i > kWhole;
          const auto reduce = both ? reduce_down<kPlaces, 2, scalar_t, T> : reduce_down<kPlaces, 1, scalar_t, T>;
          reduce(from + i, dilation * stride, count, min_of(both ? W - i - kWhole : W - i, kWhole),
                 Mask<T>{} + P(place), P(dilation * W), values.data() + at + i, places.data() + (kPlaces ? at + i : 0));
        }
      }
      if (OW == 1) continue;
      for (int64_t oh = first; oh < last; ++oh) {
        const int64_t at = (oh - first) * pitch;
        for (int64_t o = 0; o < OW; ++o)
          results.add(reduce_along<kPlaces, T>(values.data() + at, places.data() + (kPlaces ? at : 0), windows[o].begin,
                                               windows[o].end),
                      row_windows[oh].begin * W + windows[o].begin);
      }
    }
    if (results.count > 0) results.write();
  });
}

}  // namespace

void forward_windows(const MaxPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.places == nullptr) return pool_windows<false, scalar_t>(p);
    pool_windows<true, scalar_t>(p);
  });
}

}  // namespace pvk::max_pool2d::PVK_ISA
