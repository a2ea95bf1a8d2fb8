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
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) sum[v] = Vec<T>{};
  for (int64_t i = taps.y.begin[ph]; i < taps.y.begin[ph + 1]; ++i) {
    const elem_t* row = map + taps.y.taps[i].pixel * row_stride;
    const T row_weight = taps.y.taps[i].weight;
    for (int64_t j = taps.x.begin[pw]; j < taps.x.begin[pw + 1]; ++j) {
      const Vec<T> weight = splat(row_weight * taps.x.taps[j].weight);
      const elem_t* pixel = row + taps.x.taps[j].pixel * column_stride;
      Vec<T> value[Vecs];
      if constexpr (Vecs % 2 == 0) {
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; v += 2) load_pair<elem_t, T>(pixel + v * kLanes<T>, value[v], value[v + 1]);
      } else {
#pragma GCC unroll 3
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
void pool_in_place(const RoiAlignParams& p, const Level& level, const scalar_t* image, const RoiTaps<T>& taps,
                   scalar_t* out) {
  constexpr int kVec = kLanes<T>;
  const int64_t row_stride = level.stride[2], column_stride = level.stride[3];
  for (int64_t ph = 0; ph < p.PH; ++ph) {
    for (int64_t pw = 0; pw < p.PW; ++pw, out += p.C) {
      int64_t c = 0;
      Vec<T> sum[kMaxVecs];
      for (; c + kMaxVecs * kVec <= p.C; c += kMaxVecs * kVec) {
        pool_bin<kMaxVecs>(image + c, taps, ph, pw, row_stride, column_stride, sum);
#pragma GCC unroll 2
        for (int v = 0; v < kMaxVecs; v += 2) store_pair<scalar_t, T>(out + c + v * kVec, sum[v], sum[v + 1]);
      }
      for (; c < p.C; c += kVec) {
        const int64_t first = min_of(c, p.C - kVec);
        pool_bin<1>(image + first, taps, ph, pw, row_stride, column_stride, sum);
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
      pool_in_place(p, level, map + rois[k].image * level.stride[0], finder.find(p, rois[k]),
                    pooled + k * p.pooled_stride[0]);
    }
  });
}

// One RoI of `lanes` packed channels, through a lane-major tile of bins, into an output of either layout.
template <int Vecs, typename scalar_t, typename T>
void pool_packed(const RoiAlignParams& p, const Level& level, const T* packed, const RoiTaps<T>& taps, T* tile,
                 int64_t lanes, scalar_t* out) {
  constexpr int64_t kWidth = Vecs * kLanes<T>;
  const int64_t rows = max_of(kTileItems / p.PW, int64_t(1));
  for (int64_t ph = 0; ph < p.PH; ph += rows) {
    const int64_t stop = min_of(ph + rows, p.PH);
    T* bin = tile;
    for (int64_t r = ph; r < stop; ++r) {
      for (int64_t pw = 0; pw < p.PW; ++pw, bin += kWidth) {
        Vec<T> sum[Vecs];
        pool_bin<Vecs>(packed, taps, r, pw, level.W * kWidth, kWidth, sum);
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) store(bin + v * kLanes<T>, sum[v]);
      }
    }
    store_tile(out + ph * p.pooled_stride[2], tile, kWidth, p.pooled_stride[1], p.pooled_stride[3], lanes,
               (stop - ph) * p.PW);
  }
}

// Marks the pixels of a map that its RoIs touch.
template <typename T>
void mark_touched(const RoiAlignParams& p, const Level& level, const TapTable<T>& table, const int64_t* order,
                  int64_t count, uint8_t* touched) {
  parallel_for(level.H, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * level.W; i < end * level.W; ++i) touched[i] = 0;
  });
  parallel_for(count, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RoiTaps<T> taps = table.at(order[i]);
      int64_t last_row = -1;
      for (int64_t a = 0; a < taps.y.begin[p.PH]; ++a) {
        if (taps.y.taps[a].pixel == last_row) continue;
        last_row = taps.y.taps[a].pixel;
        uint8_t* row = touched + last_row * level.W;  // which other threads may mark too
        for (int64_t b = 0; b < taps.x.begin[p.PW]; ++b)
          __atomic_store_n(row + taps.x.taps[b].pixel, uint8_t(1), __ATOMIC_RELAXED);
      }
    }
  });
}

// Copies the touched pixels of a row, and some between them, so that whole squares can be transposed.
template <typename scalar_t, typename T>
void pack_row(const Level& level, const uint8_t* touched, const scalar_t* source, int64_t channel_stride, int64_t lanes,
              T* packed, int64_t pitch) {
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
    load_tile(packed + first * pitch, pitch, source + first * level.stride[3], channel_stride, level.stride[3], lanes,
              last - first);
  }
}

// Any strides: a block of channels at a time is copied, pixel-major, where RoIs touch the map; both threads and
// scratch then serve the RoIs of the image from that copy. One block per two threads is in flight.
template <typename scalar_t, typename T>
void forward_packed(const RoiAlignParams& p, const Level& level, int64_t image, const TapTable<T>& table,
                    const int64_t* order, int64_t count, Buffer<T>& scratch, Buffer<uint8_t>& touched) {
  constexpr int64_t kWidth = kMaxVecs * kLanes<T>;
  const int64_t H = level.H, W = level.W;
  const scalar_t* map = static_cast<const scalar_t*>(level.map) + image * level.stride[0];
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  const int64_t blocks = ceil_div(p.C, kWidth);
  const int64_t wave = min_of(blocks, ceil_div(thread_count(), int64_t(2)));
  const auto lanes_of = [&](int64_t block) { return min_of(kWidth, p.C - block * kWidth); };
  const auto pitch_of = [&](int64_t block) { return ceil_div(lanes_of(block), int64_t(kLanes<T>)) * kLanes<T>; };
  touched.reserve(H * W);
  mark_touched(p, level, table, order, count, touched.data());
  scratch.reserve(wave * H * W * kWidth);

  for (int64_t first = 0; first < blocks; first += wave) {
    const int64_t in_wave = min_of(wave, blocks - first);
    const auto packed_of = [&](int64_t block) { return scratch.data() + (block - first) * H * W * kWidth; };
    parallel_for(in_wave * H, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = first + i / H, row = i % H, pitch = pitch_of(block);
        pack_row(level, touched.data() + row * W, map + block * kWidth * level.stride[1] + row * level.stride[2],
                 level.stride[1], lanes_of(block), packed_of(block) + row * W * pitch, pitch);
      }
    });
    parallel_for(in_wave * count, 8, [&](int64_t begin, int64_t end) {
      Buffer<T> tile(max_of(kTileItems, p.PW) * kWidth);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = first + i / count, k = order[i % count];
        const RoiTaps<T> taps = table.at(k);
        scalar_t* out = pooled + k * p.pooled_stride[0] + block * kWidth * p.pooled_stride[1];
        const T* packed = packed_of(block);
        switch (pitch_of(block) / kLanes<T>) {
          case 1:
            pool_packed<1>(p, level, packed, taps, tile.data(), lanes_of(block), out);
            break;
          case 2:
            pool_packed<2>(p, level, packed, taps, tile.data(), lanes_of(block), out);
            break;
          case 3:
            pool_packed<3>(p, level, packed, taps, tile.data(), lanes_of(block), out);
            break;
          default:
            pool_packed<4>(p, level, packed, taps, tile.data(), lanes_of(block), out);
        }
      }
    });
  }
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
  bool packs = false;
  for (int64_t l = 0; l < p.num_levels; ++l) packs |= !in_place(p.levels[l]);
  TapTable<T> table;
  if (packs) table.build(p, rois.data());
  Buffer<T> scratch;
  Buffer<uint8_t> touched;
  for (int64_t l = 0; l < p.num_levels; ++l) {
    const Level& level = p.levels[l];
    const int64_t* begin = starts.data() + l * p.N;
    if (in_place(level)) {
      forward_in_place<scalar_t>(p, level, rois.data(), order.data() + begin[0], begin[p.N] - begin[0]);
      continue;
    }
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t count = begin[n + 1] - begin[n];
      if (count > 0) forward_packed<scalar_t>(p, level, n, table, order.data() + begin[n], count, scratch, touched);
    }
  }
}

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::roi_align
