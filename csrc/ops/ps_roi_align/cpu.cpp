// Position-sensitive RoI align and pool on the CPU: plane after plane, SIMD along the columns of a bin.
//
// A plane of the map belongs to one bin of every RoI, so it is read once, into the first cache, and all RoIs of the
// image take their bin from it. Their weights are in tables, bin-major, that all planes share. Results do not depend
// on the number of threads: an element of the output, or of the map's gradient, is summed by one thread in one order
// (backward: RoIs ascending).
#include "ops/ps_roi_align/ps_roi_align.h"

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "ops/ps_roi_align/cpu_taps.h"

namespace pvk::ps_roi_align {
namespace PVK_ISA {
namespace {

constexpr int64_t kGroup = 16;               // planes that are handled together: a cache line of the pooled tensor
constexpr int64_t kBlock = 512;              // RoIs whose bins are held before they are transposed
constexpr int64_t kPitch = kBlock + kGroup;  // load_tile writes whole vectors
constexpr int64_t kMostRois = 8192;          // of a forward's tables
constexpr int64_t kPieceWork = 16384;        // bins that are worth a thread
constexpr int64_t kScratchBytes = 1 << 20;   // of planes that are held at a time, about

template <typename T, typename box_t>
void decode_rois(const PsRoiParams& p, Roi<T>* rois) {
  const box_t* boxes = static_cast<const box_t*>(p.boxes);
  for (int64_t k = 0; k < p.K; ++k) {
    const box_t* box = boxes + k * p.boxes_stride[0];
    T value[5];
    for (int i = 0; i < 5; ++i) value[i] = T(to_float(box[i * p.boxes_stride[1]]));
    rois[k] = make_roi<T>(p, value[0], value[1], value[2], value[3], value[4]);
  }
}

// RoIs by image, ascending in each: image n has order[starts[n] .. starts[n + 1]); from starts[N] on those without a
// result.
template <typename T>
void order_rois(const PsRoiParams& p, const Roi<T>* rois, Buffer<int64_t>& order, Buffer<int64_t>& starts) {
  const auto image_of = [&](int64_t k) { return rois[k].image < 0 ? p.N : rois[k].image; };
  for (int64_t n = 0; n <= p.N + 1; ++n) starts[n] = 0;
  for (int64_t k = 0; k < p.K; ++k) ++starts[image_of(k) + 1];
  for (int64_t n = 0; n <= p.N; ++n) starts[n + 1] += starts[n];
  Buffer<int64_t> next(p.N + 1);
  for (int64_t n = 0; n <= p.N; ++n) next[n] = starts[n];
  for (int64_t k = 0; k < p.K; ++k) order[next[image_of(k)]++] = k;
}

// Planes [first, first + count) of an image, and where their elements are in the pooled tensor.
struct Group {
  int64_t first, count;
  int64_t pooled[kGroup];
  bool adjacent;  // in the pooled tensor
};

Group find_group(const PsRoiParams& p, int64_t first, int64_t count) {
  Group group;
  group.first = first;
  group.count = count;
  group.adjacent = true;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t plane = first + i, bin = plane % (p.PH * p.PW);
    group.pooled[i] =
        plane / (p.PH * p.PW) * p.pooled_stride[1] + bin / p.PW * p.pooled_stride[2] + bin % p.PW * p.pooled_stride[3];
    group.adjacent = group.adjacent && group.pooled[i] == group.pooled[0] + i;
  }
  return group;
}

// The end of the run of successive RoIs that begins at order[i].
PVK_INLINE int64_t run_end(const int64_t* order, int64_t i, int64_t end) {
  int64_t stop = i + 1;
  while (stop < end && order[stop] == order[stop - 1] + 1) ++stop;
  return stop;
}

// pooled[order[i]][plane] = bins[plane][i] for i in [begin, end), converted.
template <typename scalar_t, typename T>
void store_bins(const PsRoiParams& p, const Group& group, const int64_t* order, int64_t begin, int64_t end,
                const T* bins) {
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  for (int64_t i = begin; i < end;) {
    const int64_t stop = run_end(order, i, end);
    scalar_t* target = pooled + order[i] * p.pooled_stride[0];
    if (group.adjacent) {
      store_tile(target + group.pooled[0], bins + i - begin, kPitch, p.pooled_stride[0], 1, stop - i, group.count);
    } else {
      for (int64_t g = 0; g < group.count; ++g)
        store_tile(target + group.pooled[g], bins + g * kPitch + i - begin, kPitch, p.pooled_stride[0], 1, stop - i, 1);
    }
    i = stop;
  }
}

// bins[plane][i] = pooled[order[i]][plane] for i in [begin, end), converted.
template <typename scalar_t, typename T>
void load_bins(const PsRoiParams& p, const Group& group, const int64_t* order, int64_t begin, int64_t end, T* bins) {
  const scalar_t* pooled = static_cast<const scalar_t*>(p.pooled);
  for (int64_t i = begin; i < end;) {
    const int64_t stop = run_end(order, i, end);
    const scalar_t* source = pooled + order[i] * p.pooled_stride[0];
    if (group.adjacent) {
      load_tile(bins + i - begin, kPitch, source + group.pooled[0], p.pooled_stride[0], 1, stop - i, group.count);
    } else {
      for (int64_t g = 0; g < group.count; ++g)
        load_tile(bins + g * kPitch + i - begin, kPitch, source + group.pooled[g], p.pooled_stride[0], 1, stop - i, 1);
    }
    i = stop;
  }
}

// How the planes of a map are reached: in place, or through a copy in T with rows of W elements.
struct Planes {
  bool in_place;
  int64_t row, pitch;  // of the rows of a plane, of the planes
  int64_t group;       // planes that a task holds at a time
};

template <typename scalar_t, typename T>
Planes plan_planes(const PsRoiParams& p) {
  constexpr bool kSame = sizeof(scalar_t) == sizeof(T);
  if (kSame && p.map_stride[3] == 1 && p.W >= kRun<T>) return {true, p.map_stride[2], p.map_stride[1], kGroup};
  const int64_t pitch = ceil_div(p.H * p.W, kGroup) * kGroup + kGroup;
  const int64_t fitting = kScratchBytes / (pitch * int64_t(sizeof(T)));
  // A group of kGroup is transposed fastest; planes that are each contiguous need no transposition.
  const bool transposed = p.map_stride[1] < p.map_stride[3];
  return {false, p.W, pitch, transposed ? kGroup : max_of(int64_t(1), min_of(fitting, kGroup))};
}

// Rows [begin, end) of some planes, from the map into a copy.
template <typename scalar_t, typename T>
void load_planes(const PsRoiParams& p, const Planes& planes, int64_t image, int64_t first, int64_t count,
                 int64_t row_begin, int64_t row_end, T* copy) {
  const scalar_t* map = static_cast<const scalar_t*>(p.map) + image * p.map_stride[0] + first * p.map_stride[1];
  const bool joined = p.map_stride[2] == p.W * p.map_stride[3];
  const int64_t lines = joined ? 1 : row_end - row_begin, pixels = joined ? (row_end - row_begin) * p.W : p.W;
  const int64_t together = p.map_stride[3] == 1 ? 1 : count;
  for (int64_t c = 0; c < count; c += together)
    for (int64_t line = 0; line < lines; ++line)
      load_tile(copy + c * planes.pitch + (row_begin + line) * p.W, planes.pitch,
                map + c * p.map_stride[1] + (row_begin + line) * p.map_stride[2], p.map_stride[3], p.map_stride[1],
                pixels, together);
}

// The whole planes back into the map.
template <typename scalar_t, typename T>
void store_planes(const PsRoiParams& p, const Planes& planes, int64_t image, int64_t first, int64_t count,
                  const T* copy) {
  scalar_t* map = static_cast<scalar_t*>(p.map) + image * p.map_stride[0] + first * p.map_stride[1];
  const bool joined = p.map_stride[2] == p.W * p.map_stride[3];
  const int64_t lines = joined ? 1 : p.H, pixels = joined ? p.H * p.W : p.W;
  const int64_t together = p.map_stride[3] == 1 ? 1 : count;
  for (int64_t c = 0; c < count; c += together)
    for (int64_t line = 0; line < lines; ++line)
      store_tile(map + c * p.map_stride[1] + line * p.map_stride[2], copy + c * planes.pitch + line * p.W, planes.pitch,
                 p.map_stride[3], p.map_stride[1], pixels, together);
}

// Calls body(first, count, scratch, bins) for every group of planes, on all threads. `scratch` has a group's planes,
// `bins` kBlock of each.
template <typename T, typename Body>
void for_each_group(const PsRoiParams& p, const Planes& planes, int64_t rois, const Body& body) {
  const int64_t channels = p.C * p.PH * p.PW;
  const int64_t groups = ceil_div(channels, planes.group);
  const int64_t work = planes.group * (rois + (planes.in_place ? 0 : p.H * p.W / 8));
  const int64_t chunk = max_of(ceil_div(kPieceWork, max_of(work, int64_t(1))), ceil_div(groups, 8 * thread_count()));
  parallel_for(groups, chunk, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(planes.in_place ? 0 : planes.group * planes.pitch + kRun<T>), bins(planes.group * kPitch);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * planes.group;
      body(first, min_of(planes.group, channels - first), scratch.data(), bins.data());
    }
  });
}

template <typename scalar_t, typename T>
void forward_image(const PsRoiParams& p, const Roi<T>* rois, const int64_t* order, int64_t count, int64_t image) {
  constexpr int64_t kStep = kRun<T>;
  const Planes planes = plan_planes<scalar_t, T>(p);
  Taps<T> taps;
  taps.build(p, rois, order, count, planes.row);
  for_each_group<T>(p, planes, count, [&](int64_t first, int64_t in_group, T* scratch, T* bins) {
    const Group group = find_group(p, first, in_group);
    const T* source = scratch;
    if (planes.in_place) {
      source = static_cast<const T*>(p.map) + image * p.map_stride[0] + first * p.map_stride[1];
    } else {
      load_planes<scalar_t>(p, planes, image, first, in_group, taps.first_row, taps.last_row + 1, scratch);
    }
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t end = min_of(begin + kBlock, count);
      for (int64_t i = 0; i < in_group; ++i) {
        const int64_t bin = (first + i) % (p.PH * p.PW);
        const T* plane = source + i * planes.pitch;
        const bool fetch = planes.in_place && begin == 0 && first + i + 1 < p.C * p.PH * p.PW;
        Fetch ahead = fetch ? plan_fetch(plane + planes.pitch + taps.first_row * planes.row,
                                         (taps.last_row - taps.first_row + 1) * planes.row, ceil_div(end, kStep))
                            : Fetch{};
        pool_plane(plane, taps, bin / p.PW, bin % p.PW, begin, end, bins + i * kPitch, ahead);
      }
      store_bins<scalar_t>(p, group, order, begin, end, bins);
    }
  });
}

template <typename scalar_t, typename box_t>
void forward_typed(const PsRoiParams& p) {
  using T = opmath_t<scalar_t>;
  Buffer<Roi<T>> rois(p.K);
  Buffer<int64_t> order(p.K), starts(p.N + 2);
  decode_rois<T, box_t>(p, rois.data());
  order_rois(p, rois.data(), order, starts);
  const int64_t size = p.C * p.PH * p.PW;
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  for (int64_t i = starts[p.N]; i < p.K; ++i)
    for (int64_t j = 0; j < size; ++j) pooled[order[i] * size + j] = from_float<scalar_t>(T(0));
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t i = starts[n]; i < starts[n + 1]; i += kMostRois)
      forward_image<scalar_t>(p, rois.data(), order.data() + i, min_of(kMostRois, starts[n + 1] - i), n);
  }
}

template <typename scalar_t, typename T>
void backward_image(const PsRoiParams& p, const Roi<T>* rois, const int64_t* order, int64_t count, int64_t image) {
  const Planes planes = plan_planes<scalar_t, T>(p);
  Taps<T> taps;
  taps.build(p, rois, order, count, planes.row);
  for_each_group<T>(p, planes, count, [&](int64_t first, int64_t in_group, T* scratch, T* bins) {
    const Group group = find_group(p, first, in_group);
    T* target = scratch;
    if (planes.in_place) target = static_cast<T*>(p.map) + image * p.map_stride[0] + first * p.map_stride[1];
    const bool once = count <= kBlock;  // then a plane is zeroed just before it is filled
    const auto clear = [&](int64_t i) {
      for (int64_t y = 0; y < p.H; ++y) fill_zeros(target + i * planes.pitch + y * planes.row, p.W);
    };
    for (int64_t i = 0; i < in_group && !once; ++i) clear(i);
    for (int64_t begin = 0; begin < max_of(count, int64_t(1)); begin += kBlock) {
      const int64_t end = min_of(begin + kBlock, count);
      load_bins<scalar_t>(p, group, order, begin, end, bins);
      for (int64_t i = 0; i < in_group; ++i) {
        const int64_t bin = (first + i) % (p.PH * p.PW);
        if (once) clear(i);
        scatter_plane(target + i * planes.pitch, taps, bin / p.PW, bin % p.PW, begin, end, bins + i * kPitch);
      }
    }
    if (!planes.in_place) store_planes<scalar_t>(p, planes, image, first, in_group, scratch);
  });
}

template <typename scalar_t, typename box_t>
void backward_typed(const PsRoiParams& p) {
  using T = opmath_t<scalar_t>;
  Buffer<Roi<T>> rois(p.K);
  Buffer<int64_t> order(p.K), starts(p.N + 2);
  decode_rois<T, box_t>(p, rois.data());
  order_rois(p, rois.data(), order, starts);
  for (int64_t n = 0; n < p.N; ++n)
    backward_image<scalar_t>(p, rois.data(), order.data() + starts[n], starts[n + 1] - starts[n], n);
}

}  // namespace

void forward(const PsRoiParams& p) {
  if (p.K * p.C * p.PH * p.PW == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.boxes_dtype == p.dtype) {
      forward_typed<scalar_t, scalar_t>(p);
    } else {
      forward_typed<scalar_t, float>(p);
    }
  });
}

void backward(const PsRoiParams& p) {
  if (p.N * p.C * p.H * p.W == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.boxes_dtype == p.dtype) {
      backward_typed<scalar_t, scalar_t>(p);
    } else {
      backward_typed<scalar_t, float>(p);
    }
  });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, PsRoiParams)
PVK_CPU_ENTRY(void, backward, PsRoiParams)

}  // namespace pvk::ps_roi_align
