// RoI align on the CPU, gradient of the maps.
#pragma once

#include "core/buffer.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "ops/roi_align/cpu_taps.h"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {
namespace PVK_ISA {
namespace {

constexpr int64_t kBandBytes = 1 << 20;  // of map gradient that a backward task accumulates, about

// dMap += weight * dBin for Vecs * kLanes channels of one bin, on rows [row_begin, row_end), which the tile holds.
template <int Vecs, typename T>
PVK_INLINE void scatter_bin(T* tile, const RoiTaps<T>& taps, int64_t ph, int64_t pw, int64_t row_begin, int64_t row_end,
                            int64_t row_stride, const T* gradient) {
  Vec<T> value[Vecs];
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) value[v] = load(gradient + v * kLanes<T>);
  for (int64_t i = taps.y.begin[ph]; i < taps.y.begin[ph + 1]; ++i) {
    const AxisTap<T>& tap = taps.y.taps[i];
    if (tap.pixel < row_begin || tap.pixel >= row_end) continue;
    T* row = tile + (tap.pixel - row_begin) * row_stride;
    for (int64_t j = taps.x.begin[pw]; j < taps.x.begin[pw + 1]; ++j) {
      const Vec<T> weight = splat(tap.weight * taps.x.taps[j].weight);
      T* pixel = row + taps.x.taps[j].pixel * (Vecs * kLanes<T>);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) store(pixel + v * kLanes<T>, fma(value[v], weight, load(pixel + v * kLanes<T>)));
    }
  }
}

// Map rows [row, row + rows) of one level, image and channel block: all RoIs that touch them, in ascending order.
struct Band {
  const Level* level;
  int64_t image, row, rows, channel, lanes;
  const int64_t* rois;
  int64_t count;
};

template <int Vecs, typename scalar_t, typename T>
void backward_band(const RoiAlignParams& p, const TapTable<T>& table, const Band& band) {
  constexpr int64_t kWidth = Vecs * kLanes<T>;
  const Level& level = *band.level;
  const int64_t row_pitch = level.W * kWidth;
  const int64_t row_begin = band.row, row_end = band.row + band.rows;
  const int64_t chunk = max_of(kTileItems / p.PW, int64_t(1));
  const bool joined = p.pooled_stride[2] == p.PW * p.pooled_stride[3];
  Buffer<T> tile(band.rows * row_pitch), bins(max_of(kTileItems, p.PW) * kWidth);
  for (int64_t i = 0; i < band.rows * row_pitch; ++i) tile[i] = T(0);
  for (int64_t index = 0; index < band.count; ++index) {
    const int64_t k = band.rois[index];
    const RoiTaps<T> taps = table.at(k);
    const auto touches = [&](int64_t ph) {
      for (int64_t i = taps.y.begin[ph]; i < taps.y.begin[ph + 1]; ++i)
        if (taps.y.taps[i].pixel >= row_begin && taps.y.taps[i].pixel < row_end) return true;
      return false;
    };
    const scalar_t* gradient =
        static_cast<const scalar_t*>(p.pooled) + k * p.pooled_stride[0] + band.channel * p.pooled_stride[1];
    for (int64_t ph = 0; ph < p.PH; ph += chunk) {
      const int64_t stop = min_of(ph + chunk, p.PH);
      int64_t first = ph, last = stop;
      while (first < stop && !touches(first)) ++first;
      while (last > first && !touches(last - 1)) --last;
      if (first == last) continue;
      const int64_t lines = joined ? 1 : last - first, items = joined ? (last - first) * p.PW : p.PW;
      for (int64_t line = 0; line < lines; ++line)
        load_tile(bins.data() + line * p.PW * kWidth, kWidth, gradient + (first + line) * p.pooled_stride[2],
                  p.pooled_stride[1], p.pooled_stride[3], band.lanes, items);
      for (int64_t r = first; r < last; ++r)
        for (int64_t pw = 0; pw < p.PW; ++pw)
          scatter_bin<Vecs>(tile.data(), taps, r, pw, row_begin, row_end, row_pitch,
                            bins.data() + ((r - first) * p.PW + pw) * kWidth);
    }
  }
  scalar_t* target = static_cast<scalar_t*>(level.map) + band.image * level.stride[0] + band.channel * level.stride[1];
  for (int64_t r = 0; r < band.rows; ++r)
    store_tile(target + (band.row + r) * level.stride[2], tile.data() + r * row_pitch, kWidth, level.stride[1],
               level.stride[3], band.lanes, level.W);
}

// How a level's maps are cut: `rows` a band, `count` bands an image; those of image n are [first + n * count, ...).
struct Bands {
  int64_t rows, count, first;
};

// For every band of every image and level, the RoIs that touch it: lists[starts[band] .. starts[band + 1]), ascending.
template <typename T>
void list_bands(const RoiAlignParams& p, const Roi<T>* rois, const TapTable<T>& table, const Bands* bands,
                int64_t total, Buffer<int64_t>& starts, Buffer<int64_t>& lists) {
  Buffer<int64_t> low(p.K), high(p.K);
  for (int64_t k = 0; k < p.K; ++k) {
    low[k] = 0;
    high[k] = -1;
    const AxisTaps<T> y = table.at(k).y;
    const int64_t count = y.begin[p.PH];
    if (count == 0) continue;
    int64_t least = y.taps[0].pixel, most = least;
    for (int64_t i = 1; i < count; ++i) {
      least = min_of(least, y.taps[i].pixel);
      most = max_of(most, y.taps[i].pixel);
    }
    const Bands& of_level = bands[rois[k].level];
    const int64_t first = of_level.first + rois[k].image * of_level.count;
    low[k] = first + least / of_level.rows;
    high[k] = first + most / of_level.rows;
  }
  for (int64_t b = 0; b <= total; ++b) starts[b] = 0;
  for (int64_t k = 0; k < p.K; ++k)
    for (int64_t b = low[k]; b <= high[k]; ++b) ++starts[b + 1];
  for (int64_t b = 0; b < total; ++b) starts[b + 1] += starts[b];
  lists.reserve(starts[total]);
  Buffer<int64_t> next(total);
  for (int64_t b = 0; b < total; ++b) next[b] = starts[b];
  for (int64_t k = 0; k < p.K; ++k)
    for (int64_t b = low[k]; b <= high[k]; ++b) lists[next[b]++] = k;
}

template <typename scalar_t, typename box_t>
void backward_typed(const RoiAlignParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kVec = kLanes<T>, kWidth = kMaxVecs * kVec;
  const int64_t blocks = ceil_div(p.C, kWidth);
  Bands bands[kMaxLevels];
  int64_t total = 0, pixels = 0;
  for (int l = 0; l < p.num_levels; ++l) pixels += p.levels[l].H * p.levels[l].W;
  const int64_t wanted = ceil_div(pixels * p.N * blocks, 4 * thread_count());  // of a task: four tasks a thread
  const int64_t fitting = kBandBytes / (kWidth * int64_t(sizeof(T)));
  for (int l = 0; l < p.num_levels; ++l) {
    const Level& level = p.levels[l];
    const int64_t height = level.W > 0 ? level.H : 0;
    const int64_t rows = min_of(wanted, fitting) / max_of(level.W, int64_t(1));
    bands[l].rows = max_of(min_of(rows, height), int64_t(1));
    bands[l].count = ceil_div(height, bands[l].rows);
    bands[l].first = total;
    total += p.N * bands[l].count;
  }
  Buffer<Roi<T>> rois(p.K);
  Buffer<int64_t> starts(total + 1);
  Buffer<int64_t> lists;
  decode_rois<T, box_t>(p, rois.data());
  TapTable<T> table;
  table.build(p, rois.data());
  list_bands(p, rois.data(), table, bands, total, starts, lists);
  parallel_for(total * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks, index = task / blocks;
      int l = 0;
      while (l + 1 < p.num_levels && index >= bands[l + 1].first) ++l;
      const int64_t in_level = index - bands[l].first, row = in_level % bands[l].count * bands[l].rows;
      const Band band{&p.levels[l],
                      in_level / bands[l].count,
                      row,
                      min_of(bands[l].rows, p.levels[l].H - row),
                      block * kWidth,
                      min_of(kWidth, p.C - block * kWidth),
                      lists.data() + starts[index],
                      starts[index + 1] - starts[index]};
      switch (ceil_div(band.lanes, kVec)) {
        case 1:
          backward_band<1, scalar_t>(p, table, band);
          break;
        case 2:
          backward_band<2, scalar_t>(p, table, band);
          break;
        case 3:
          backward_band<3, scalar_t>(p, table, band);
          break;
        default:
          backward_band<4, scalar_t>(p, table, band);
      }
    }
  });
}

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::roi_align
