// RoI align on the CPU, forward.
#pragma once

#include "core/buffer.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/radix_sort.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "ops/roi_align/cpu_taps.h"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {
namespace PVK_ISA {
namespace {

// RoIs by level and image and then by place, so that neighbours in time are neighbours in the cache. `starts[g]` is the
// first of group g = level * N + image in `order`; the last start is where the RoIs begin whose result is zeros.
template <typename T>
void order_rois(const RoiAlignParams& p, const Roi<T>* rois, Buffer<int64_t>& order, Buffer<int64_t>& starts) {
  constexpr int kPlaceBits = 14;
  const int64_t groups = p.num_levels * p.N;
  Buffer<uint64_t> keys(p.K);
  const auto tile = [](const RoiAxis<T>& axis, int64_t size) {
    const T place = min_of(max_of(axis.start, T(0)), T(size));
    return uint64_t(min_of(int64_t(place) / 32, (int64_t(1) << kPlaceBits) - 1));
  };
  for (int64_t g = 0; g <= groups; ++g) starts[g] = 0;
  for (int64_t k = 0; k < p.K; ++k) {
    const Roi<T>& roi = rois[k];
    order[k] = k;
    if (roi.image < 0) {  // last; its axes may be NaN
      keys[k] = uint64_t(groups) << 2 * kPlaceBits;
      continue;
    }
    const Level& level = p.levels[roi.level];
    const int64_t group = roi.level * p.N + roi.image;
    ++starts[group + 1];
    keys[k] = (uint64_t(group) << kPlaceBits | tile(roi.y, level.H)) << kPlaceBits | tile(roi.x, level.W);
  }
  for (int64_t g = 0; g < groups; ++g) starts[g + 1] += starts[g];
  radix_sort(keys, order, p.K);
}

// Vecs * kLanes channels of one bin; an even number of vectors is in the order of load_pair.
template <int Vecs, typename elem_t, typename T>
PVK_INLINE void pool_bin(const elem_t* map, const RoiTaps<T>& taps, int64_t ph, int64_t pw, int64_t row_stride,
                         int64_t column_stride, Vec<T>* sum) {
  const AxisTap<T>* const columns = taps.x.taps + taps.x.begin[pw];
  const int64_t num_columns = taps.x.begin[pw + 1] - taps.x.begin[pw];
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) sum[v] = Vec<T>{};
  for (int64_t i = taps.y.begin[ph]; i < taps.y.begin[ph + 1]; ++i) {
    const elem_t* row = map + taps.y.taps[i].pixel * row_stride;
    const T row_weight = taps.y.taps[i].weight;
    for (int64_t j = 0; j < num_columns; ++j) {
      const Vec<T> weight = splat(row_weight * columns[j].weight);
      const elem_t* pixel = row + columns[j].pixel * column_stride;
      Vec<T> value[Vecs];
      if constexpr (Vecs % 2 == 0) {
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; v += 2) load_pair<elem_t, T>(pixel + v * kLanes<T>, value[v], value[v + 1]);
      } else {
        for (int v = 0; v < Vecs; ++v) value[v] = load(pixel + v * kLanes<T>);
      }
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) sum[v] = fma(value[v], weight, sum[v]);
    }
  }
}

// One RoI of a channels_last map, straight into a channels_last output. C >= kLanes; a narrow last block overlaps the
// one before it.
template <typename scalar_t, typename T>
void pool_in_place(const RoiAlignParams& p, const scalar_t* image, const RoiTaps<T>& taps, scalar_t* out) {
  constexpr int kVec = kLanes<T>;
  for (int64_t ph = 0; ph < p.PH; ++ph) {
    for (int64_t pw = 0; pw < p.PW; ++pw, out += p.C) {
      int64_t c = 0;
      Vec<T> sum[kMaxVecs];
      for (; c + kMaxVecs * kVec <= p.C; c += kMaxVecs * kVec) {
        pool_bin<kMaxVecs>(image + c, taps, ph, pw, 1, 1, sum);
#pragma GCC unroll 2
        for (int v = 0; v < kMaxVecs; v += 2) store_pair<scalar_t, T>(out + c + v * kVec, sum[v], sum[v + 1]);
      }
      for (; c < p.C; c += kVec) {
        const int64_t first = min_of(c, p.C - kVec);
        pool_bin<1>(image + first, taps, ph, pw, 1, 1, sum);
        store(out + first, sum[0]);
      }
    }
  }
}

template <typename scalar_t, typename T>
void forward_in_place(const RoiAlignParams& p, const Level& level, const Roi<T>* rois, const int64_t* order,
                      int64_t count) {
  const scalar_t* map = static_cast<const scalar_t*>(level.map);
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  parallel_for(count, 8, [&](int64_t begin, int64_t end) {
    TapFinder<T> finder;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = order[i];
      pool_in_place(p, map + rois[k].image * level.stride[0], finder.find(p, rois[k], level.stride[2], level.stride[3]),
                    pooled + k * p.pooled_stride[0]);
    }
  });
}

// ---- any strides: maps are packed pixel-major, a few channels at a time, where RoIs touch them ----

constexpr int kPackedVecs = 128 / kRegisterBytes;  // two cache lines a pixel: what RoIs share stays in the cache
template <typename T>
constexpr int64_t kPackedWidth = kPackedVecs * kLanes<T>;

// One RoI of `lanes` packed channels, through a lane-major tile of bins, into an output of either layout.
template <typename scalar_t, typename T>
void pool_packed(const RoiAlignParams& p, const Level& level, const T* packed, const RoiTaps<T>& taps, T* tile,
                 int64_t lanes, scalar_t* out) {
  constexpr int64_t kWidth = kPackedWidth<T>;
  const int64_t rows = max_of(kTileItems / p.PW, int64_t(1));
  for (int64_t ph = 0; ph < p.PH; ph += rows) {
    const int64_t stop = min_of(ph + rows, p.PH);
    T* bin = tile;
    for (int64_t r = ph; r < stop; ++r) {
      for (int64_t pw = 0; pw < p.PW; ++pw, bin += kWidth) {
        Vec<T> sum[kPackedVecs];
        pool_bin<kPackedVecs>(packed, taps, r, pw, level.W * kWidth, kWidth, sum);
#pragma GCC unroll 4
        for (int v = 0; v < kPackedVecs; ++v) store(bin + v * kLanes<T>, sum[v]);
      }
    }
    store_tile(out + ph * p.pooled_stride[2], tile, kWidth, p.pooled_stride[1], p.pooled_stride[3], lanes,
               (stop - ph) * p.PW);
  }
}

// Copies the touched pixels of a row, and some beside them, so that whole squares can be transposed.
template <typename scalar_t, typename T>
void pack_row(const Level& level, const uint8_t* touched, const scalar_t* source, int64_t channel_stride, int64_t lanes,
              T* packed) {
  constexpr int64_t kSide = kLanes<T>;
  const int64_t W = level.W;
  int64_t x = 0;
  while (x < W) {
    if (!touched[x]) {
      ++x;
      continue;
    }
    const int64_t first = min_of(x, max_of(W - kSide, int64_t(0)));
    do x += kSide;
    while (x < W && touched[x]);
    const int64_t last = min_of(x, W);
    load_tile(packed + first * kPackedWidth<T>, kPackedWidth<T>, source + first * level.stride[3], channel_stride,
              level.stride[3], lanes, last - first);
  }
}

// One image of one level, which channel blocks and runs of its RoIs serve: tasks [first_task, first_task + ...).
struct PackedMap {
  const Level* level;
  int64_t image;
  const int64_t* rois;  // by place
  int64_t count;
  uint8_t* touched;  // [H, W]: whether some RoI touches the pixel
  int64_t first_task;
};

// Marks the pixels that a RoI touches; other threads may mark the same.
template <typename T>
void mark_touched(const RoiAlignParams& p, const RoiTaps<T>& taps, int64_t W, uint8_t* touched) {
  int64_t last_row = -1;
  for (int64_t a = 0; a < taps.y.begin[p.PH]; ++a) {
    if (taps.y.taps[a].pixel == last_row) continue;
    last_row = taps.y.taps[a].pixel;
    uint8_t* row = touched + last_row * W;
    for (int64_t b = 0; b < taps.x.begin[p.PW]; ++b)
      __atomic_store_n(row + taps.x.taps[b].pixel, uint8_t(1), __ATOMIC_RELAXED);
  }
}

// What a thread needs for its tasks.
template <typename T>
struct PackedScratch {
  Buffer<T> packed, tile;
  Buffer<uint8_t> has_row;
};

// A block of channels for a run of RoIs in the order of their place: a row is packed when a RoI first needs it, and is
// likely to be in the cache still when the next one does.
template <typename scalar_t, typename T>
void forward_run(const RoiAlignParams& p, const TapTable<T>& table, const PackedMap& map, int64_t channel,
                 int64_t begin, int64_t end, PackedScratch<T>& scratch) {
  constexpr int64_t kWidth = kPackedWidth<T>;
  const Level& level = *map.level;
  const int64_t lanes = min_of(kWidth, p.C - channel);
  const scalar_t* source =
      static_cast<const scalar_t*>(level.map) + map.image * level.stride[0] + channel * level.stride[1];
  scratch.packed.reserve(level.H * level.W * kWidth);
  scratch.tile.reserve(max_of(kTileItems, p.PW) * kWidth);
  scratch.has_row.reserve(level.H);
  for (int64_t row = 0; row < level.H; ++row) scratch.has_row[row] = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t k = map.rois[i];
    const RoiTaps<T> taps = table.at(k);
    for (int64_t a = 0; a < taps.y.begin[p.PH]; ++a) {
      const int64_t row = taps.y.taps[a].pixel;
      if (scratch.has_row[row]) continue;
      scratch.has_row[row] = 1;
      pack_row(level, map.touched + row * level.W, source + row * level.stride[2], level.stride[1], lanes,
               scratch.packed.data() + row * level.W * kWidth);
    }
    scalar_t* out = static_cast<scalar_t*>(p.pooled) + k * p.pooled_stride[0] + channel * p.pooled_stride[1];
    pool_packed(p, level, scratch.packed.data(), taps, scratch.tile.data(), lanes, out);
  }
}

// Any strides. `maps` are those with RoIs.
template <typename scalar_t, typename T>
void forward_packed(const RoiAlignParams& p, const TapTable<T>& table, PackedMap* maps, int64_t num_maps) {
  constexpr int64_t kWidth = kPackedWidth<T>;
  constexpr int64_t kLeastRun = 16;  // RoIs, to share what is packed
  const int64_t blocks = ceil_div(p.C, kWidth), threads = thread_count();
  int64_t pixels = 0, rois = 0;
  for (int64_t m = 0; m < num_maps; ++m) {
    pixels += maps[m].level->H * maps[m].level->W;
    rois += maps[m].count;
  }
  const int64_t run = max_of(ceil_div(rois * blocks, 4 * threads), kLeastRun);
  Buffer<uint8_t> touched(pixels);
  int64_t tasks = 0;
  uint8_t* free = touched.data();
  for (int64_t m = 0; m < num_maps; ++m) {
    maps[m].touched = free;
    maps[m].first_task = tasks;
    free += maps[m].level->H * maps[m].level->W;
    tasks += blocks * ceil_div(maps[m].count, run);
  }
  parallel_for(pixels, 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) touched[i] = 0;
  });
  for (int64_t m = 0; m < num_maps; ++m) {
    const PackedMap& map = maps[m];
    parallel_for(map.count, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) mark_touched(p, table.at(map.rois[i]), map.level->W, map.touched);
    });
  }
  int64_t next = 0;
  parallel_for(min_of(tasks, threads), 1, [&](int64_t, int64_t) {
    PackedScratch<T> scratch;
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      int64_t m = 0;
      for (int64_t last = num_maps; last - m > 1;) {
        const int64_t middle = (m + last) / 2;
        (maps[middle].first_task <= task ? m : last) = middle;
      }
      const int64_t in_map = task - maps[m].first_task, begin = in_map / blocks * run;
      forward_run<scalar_t>(p, table, maps[m], in_map % blocks * kWidth, begin, min_of(begin + run, maps[m].count),
                            scratch);
    }
  });
}

template <typename scalar_t, typename box_t>
void forward_typed(const RoiAlignParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t groups = p.num_levels * p.N;
  Buffer<Roi<T>> rois(p.K);
  Buffer<int64_t> order(p.K), starts(groups + 1);
  decode_rois<T, box_t>(p, rois.data());
  order_rois(p, rois.data(), order, starts);
  const int64_t size = p.C * p.PH * p.PW;
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  for (int64_t i = starts[groups]; i < p.K; ++i) {
    scalar_t* out = pooled + order[i] * size;
    for (int64_t j = 0; j < size; ++j) out[j] = from_float<scalar_t>(opmath_t<scalar_t>(0));
  }
  const auto in_place = [&](const Level& level) { return p.channels_last && level.stride[1] == 1 && p.C >= kLanes<T>; };
  Buffer<PackedMap> maps(groups);
  int64_t num_maps = 0;
  for (int l = 0; l < p.num_levels; ++l) {
    const Level& level = p.levels[l];
    const int64_t* begin = starts.data() + l * p.N;
    if (in_place(level)) {
      forward_in_place<scalar_t>(p, level, rois.data(), order.data() + begin[0], begin[p.N] - begin[0]);
      continue;
    }
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t count = begin[n + 1] - begin[n];
      if (count > 0) maps[num_maps++] = {&level, n, order.data() + begin[n], count, nullptr, 0};
    }
  }
  if (num_maps == 0) return;
  TapTable<T> table;
  table.build(p, rois.data());
  forward_packed<scalar_t>(p, table, maps.data(), num_maps);
}

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::roi_align
