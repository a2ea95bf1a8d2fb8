// RoI align on the CPU, forward and backward: SIMD along channels.
//
// Sampling is separable: a bin is a sum over a few map rows times a few map columns, so each RoI gets one short list
// of (offset, weight) taps per bin and axis, with samples that share a pixel merged, and all its channels use them.
// Results do not depend on the number of threads: an element of the output, or of the map's gradient, is summed by
// one thread in one order (backward: RoIs ascending).
#include "ops/roi_align/roi_align.h"

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/radix_sort.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace pvk::roi_align {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int kMaxVecs = 4;              // vectors of a channel block
constexpr int64_t kSegment = 16;         // columns that are packed together
constexpr int64_t kTileItems = 64;       // bins that are held lane-major at a time, about
constexpr int64_t kBandBytes = 1 << 20;  // of map gradient that a backward task accumulates, about

// The taps of every bin along one axis: bin p has taps [begin[p], begin[p + 1]).
template <typename T>
struct AxisTaps {
  Buffer<int64_t> begin, offset;
  Buffer<T> weight;

  void build(const RoiAxis<T>& axis, int64_t bins, int64_t size, int64_t stride, bool adaptive, T scale) {
    int64_t bound = 0;
    begin.reserve(bins + 1);
    for (int64_t p = 0; p < bins; ++p) {
      const SampleRange range = sample_range(axis, p, size, adaptive);
      bound += 2 * (range.end - range.begin);
    }
    offset.reserve(bound);
    weight.reserve(bound);
    int64_t count = 0;
    for (int64_t p = 0; p < bins; ++p) {
      const int64_t first = begin[p] = count;
      const auto add = [&](int64_t place, T value) {
        if (value == T(0)) return;
        for (int64_t earlier = count - 1; earlier >= first && earlier >= count - 2; --earlier) {
          if (offset[earlier] == place) {
            weight[earlier] += value;
            return;
          }
        }
        offset[count] = place;
        weight[count++] = value;
      };
      const SampleRange range = sample_range(axis, p, size, adaptive);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const Tap<T> tap = make_tap(sample_position(axis, p, i), size);
        add(tap.low * stride, tap.low_weight * scale);
        add(tap.high * stride, tap.high_weight * scale);
      }
    }
    begin[bins] = count;
  }

  int64_t total(int64_t bins) const { return begin[bins]; }
};

template <typename T>
struct RoiTaps {
  AxisTaps<T> y, x;

  void build(const RoiAlignParams& p, const Roi<T>& roi, int64_t row_stride, int64_t column_stride) {
    const bool adaptive = p.sampling_ratio <= 0;
    y.build(roi.y, p.PH, p.H, row_stride, adaptive, roi.inverse_count);
    x.build(roi.x, p.PW, p.W, column_stride, adaptive, T(1));
  }
};

template <typename T, typename box_t>
void decode_rois(const RoiAlignParams& p, Roi<T>* rois) {
  const box_t* boxes = static_cast<const box_t*>(p.boxes);
  for (int64_t k = 0; k < p.K; ++k) {
    const box_t* box = boxes + k * p.boxes_stride[0];
    T value[5];
    for (int i = 0; i < 5; ++i) value[i] = T(to_float(box[i * p.boxes_stride[1]]));
    rois[k] = make_roi<T>(p, value[0], value[1], value[2], value[3], value[4]);
  }
}

// RoIs by image and then by place, so that neighbours in time are neighbours in the cache. `starts[n]` is the first
// of image n in `order`; starts[N] is where the RoIs begin whose result is zeros.
template <typename T>
void order_rois(const RoiAlignParams& p, const Roi<T>* rois, Buffer<int64_t>& order, Buffer<int64_t>& starts) {
  Buffer<uint64_t> keys(p.K);
  const auto tile = [](const RoiAxis<T>& axis, int64_t size) {
    const T place = min_of(max_of(axis.start, T(0)), T(size));
    return min_of(int64_t(place) / 32, int64_t(0xffff));
  };
  for (int64_t n = 0; n <= p.N; ++n) starts[n] = 0;
  for (int64_t k = 0; k < p.K; ++k) {
    order[k] = k;
    if (rois[k].image < 0) {  // last; its axes may be NaN
      keys[k] = uint64_t(p.N) << 32;
      continue;
    }
    ++starts[rois[k].image + 1];
    keys[k] = uint64_t(rois[k].image) << 32 | uint64_t(tile(rois[k].y, p.H)) << 16 | uint64_t(tile(rois[k].x, p.W));
  }
  for (int64_t n = 0; n < p.N; ++n) starts[n + 1] += starts[n];
  radix_sort(keys, order, p.K);
}

// Vecs * kLanes channels of one bin; an even number of vectors is in the order of load_pair.
template <int Vecs, typename elem_t, typename T>
PVK_INLINE void pool_bin(const elem_t* map, const RoiTaps<T>& taps, int64_t ph, int64_t pw, Vec<T>* sum) {
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) sum[v] = Vec<T>{};
  for (int64_t i = taps.y.begin[ph]; i < taps.y.begin[ph + 1]; ++i) {
    const elem_t* row = map + taps.y.offset[i];
    for (int64_t j = taps.x.begin[pw]; j < taps.x.begin[pw + 1]; ++j) {
      const Vec<T> weight = splat(taps.y.weight[i] * taps.x.weight[j]);
      const elem_t* pixel = row + taps.x.offset[j];
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
void pool_in_place(const RoiAlignParams& p, const scalar_t* image, const RoiTaps<T>& taps, scalar_t* out) {
  constexpr int kVec = kLanes<T>;
  for (int64_t ph = 0; ph < p.PH; ++ph) {
    for (int64_t pw = 0; pw < p.PW; ++pw, out += p.C) {
      int64_t c = 0;
      Vec<T> sum[kMaxVecs];
      for (; c + kMaxVecs * kVec <= p.C; c += kMaxVecs * kVec) {
        pool_bin<kMaxVecs>(image + c, taps, ph, pw, sum);
#pragma GCC unroll 2
        for (int v = 0; v < kMaxVecs; v += 2) store_pair<scalar_t, T>(out + c + v * kVec, sum[v], sum[v + 1]);
      }
      for (; c < p.C; c += kVec) {
        const int64_t first = min_of(c, p.C - kVec);
        pool_bin<1>(image + first, taps, ph, pw, sum);
        store(out + first, sum[0]);
      }
    }
  }
}

// One RoI of `lanes` packed channels, through a lane-major tile of bins, into an output of either layout.
template <int Vecs, typename scalar_t, typename T>
void pool_packed(const RoiAlignParams& p, const T* packed, const RoiTaps<T>& taps, T* tile, int64_t lanes,
                 scalar_t* out) {
  constexpr int64_t kWidth = Vecs * kLanes<T>;
  const int64_t rows = max_of(kTileItems / p.PW, int64_t(1));
  for (int64_t ph = 0; ph < p.PH; ph += rows) {
    const int64_t stop = min_of(ph + rows, p.PH);
    T* bin = tile;
    for (int64_t r = ph; r < stop; ++r) {
      for (int64_t pw = 0; pw < p.PW; ++pw, bin += kWidth) {
        Vec<T> sum[Vecs];
        pool_bin<Vecs>(packed, taps, r, pw, sum);
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) store(bin + v * kLanes<T>, sum[v]);
      }
    }
    store_tile(out + ph * p.pooled_stride[2], tile, kWidth, p.pooled_stride[1], p.pooled_stride[3], lanes,
               (stop - ph) * p.PW);
  }
}

template <typename scalar_t, typename T>
void forward_in_place(const RoiAlignParams& p, const Roi<T>* rois, Buffer<int64_t>& order, int64_t count) {
  const scalar_t* map = static_cast<const scalar_t*>(p.map);
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  parallel_for(count, 8, [&](int64_t begin, int64_t end) {
    RoiTaps<T> taps;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = order[i];
      taps.build(p, rois[k], p.map_stride[2], p.map_stride[3]);
      pool_in_place(p, map + rois[k].image * p.map_stride[0], taps, pooled + k * p.pooled_stride[0]);
    }
  });
}

// Which runs of kSegment columns of each row some RoI of the image touches: touched[row][segment].
template <typename T>
void mark_touched(const RoiAlignParams& p, const Roi<T>* rois, const int64_t* order, int64_t count, uint8_t* touched) {
  const int64_t segments = ceil_div(p.W, kSegment);
  for (int64_t i = 0; i < p.H * segments; ++i) touched[i] = 0;
  RoiTaps<T> taps;
  for (int64_t i = 0; i < count; ++i) {
    taps.build(p, rois[order[i]], 1, 1);
    int64_t last_row = -1;
    for (int64_t a = 0; a < taps.y.total(p.PH); ++a) {
      if (taps.y.offset[a] == last_row) continue;
      last_row = taps.y.offset[a];
      for (int64_t b = 0; b < taps.x.total(p.PW); ++b) touched[last_row * segments + taps.x.offset[b] / kSegment] = 1;
    }
  }
}

// Any strides: a block of channels at a time is copied, pixel-major, where RoIs touch the map; both threads and
// scratch then serve the RoIs of the image from that copy. One block per two threads is in flight.
template <typename scalar_t, typename T>
void forward_packed(const RoiAlignParams& p, const Roi<T>* rois, const int64_t* order, int64_t count, int64_t image,
                    Buffer<T>& scratch, Buffer<uint8_t>& touched) {
  constexpr int64_t kWidth = kMaxVecs * kLanes<T>;
  const scalar_t* map = static_cast<const scalar_t*>(p.map) + image * p.map_stride[0];
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  const int64_t segments = ceil_div(p.W, kSegment);
  const int64_t blocks = ceil_div(p.C, kWidth);
  const int64_t wave = min_of(blocks, ceil_div(thread_count(), int64_t(2)));
  const auto lanes_of = [&](int64_t block) { return min_of(kWidth, p.C - block * kWidth); };
  const auto pitch_of = [&](int64_t block) { return ceil_div(lanes_of(block), int64_t(kLanes<T>)) * kLanes<T>; };
  touched.reserve(p.H * segments);
  mark_touched(p, rois, order, count, touched.data());
  scratch.reserve(wave * p.H * p.W * kWidth);

  for (int64_t first = 0; first < blocks; first += wave) {
    const int64_t in_wave = min_of(wave, blocks - first);
    const auto packed_of = [&](int64_t block) { return scratch.data() + (block - first) * p.H * p.W * kWidth; };
    parallel_for(in_wave * p.H, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = first + i / p.H, row = i % p.H, pitch = pitch_of(block);
        const scalar_t* source = map + block * kWidth * p.map_stride[1] + row * p.map_stride[2];
        const uint8_t* flags = touched.data() + row * segments;
        for (int64_t s = 0; s < segments; ++s) {
          if (!flags[s]) continue;
          const int64_t x = s * kSegment;
          while (s + 1 < segments && flags[s + 1]) ++s;
          const int64_t items = min_of((s + 1) * kSegment, p.W) - x;
          load_tile(packed_of(block) + (row * p.W + x) * pitch, pitch, source + x * p.map_stride[3], p.map_stride[1],
                    p.map_stride[3], lanes_of(block), items);
        }
      }
    });
    parallel_for(in_wave * count, 8, [&](int64_t begin, int64_t end) {
      RoiTaps<T> taps;
      Buffer<T> tile(max_of(kTileItems, p.PW) * kWidth);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = first + i / count, k = order[i % count], pitch = pitch_of(block);
        taps.build(p, rois[k], p.W * pitch, pitch);
        scalar_t* out = pooled + k * p.pooled_stride[0] + block * kWidth * p.pooled_stride[1];
        const T* packed = packed_of(block);
        switch (pitch / kLanes<T>) {
          case 1:
            pool_packed<1>(p, packed, taps, tile.data(), lanes_of(block), out);
            break;
          case 2:
            pool_packed<2>(p, packed, taps, tile.data(), lanes_of(block), out);
            break;
          case 3:
            pool_packed<3>(p, packed, taps, tile.data(), lanes_of(block), out);
            break;
          default:
            pool_packed<4>(p, packed, taps, tile.data(), lanes_of(block), out);
        }
      }
    });
  }
}

template <typename scalar_t, typename box_t>
void forward_typed(const RoiAlignParams& p) {
  using T = opmath_t<scalar_t>;
  Buffer<Roi<T>> rois(p.K);
  Buffer<int64_t> order(p.K), starts(p.N + 1);
  decode_rois<T, box_t>(p, rois.data());
  order_rois(p, rois.data(), order, starts);
  const int64_t size = p.C * p.PH * p.PW;
  scalar_t* pooled = static_cast<scalar_t*>(p.pooled);
  for (int64_t i = starts[p.N]; i < p.K; ++i) {
    scalar_t* out = pooled + order[i] * size;
    for (int64_t j = 0; j < size; ++j) out[j] = from_float<scalar_t>(opmath_t<scalar_t>(0));
  }
  if (p.channels_last && p.map_stride[1] == 1 && p.C >= kLanes<T>) {
    forward_in_place<scalar_t>(p, rois.data(), order, starts[p.N]);
    return;
  }
  Buffer<T> scratch;
  Buffer<uint8_t> touched;
  for (int64_t n = 0; n < p.N; ++n) {
    const int64_t count = starts[n + 1] - starts[n];
    if (count > 0) forward_packed<scalar_t>(p, rois.data(), order.data() + starts[n], count, n, scratch, touched);
  }
}

// ---- backward ----

// dMap += weight * dBin for Vecs * kLanes channels of one bin, on rows [row_begin, row_end) of the tile.
template <int Vecs, typename T>
PVK_INLINE void scatter_bin(T* tile, const RoiTaps<T>& taps, int64_t ph, int64_t pw, int64_t row_begin, int64_t row_end,
                            const T* gradient) {
  Vec<T> value[Vecs];
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) value[v] = load(gradient + v * kLanes<T>);
  for (int64_t i = taps.y.begin[ph]; i < taps.y.begin[ph + 1]; ++i) {
    if (taps.y.offset[i] < row_begin || taps.y.offset[i] >= row_end) continue;
    T* row = tile + (taps.y.offset[i] - row_begin);
    for (int64_t j = taps.x.begin[pw]; j < taps.x.begin[pw + 1]; ++j) {
      const Vec<T> weight = splat(taps.y.weight[i] * taps.x.weight[j]);
      T* pixel = row + taps.x.offset[j];
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) store(pixel + v * kLanes<T>, fma(value[v], weight, load(pixel + v * kLanes<T>)));
    }
  }
}

// Map rows [row, row + rows) of one image and one channel block: all RoIs that touch them, in ascending order.
struct Band {
  int64_t image, row, rows, channel, lanes;
  const int64_t* rois;
  int64_t count;
};

template <int Vecs, typename scalar_t, typename T>
void backward_band(const RoiAlignParams& p, const Roi<T>* rois, const Band& band) {
  constexpr int64_t kWidth = Vecs * kLanes<T>;
  const int64_t row_pitch = p.W * kWidth;
  const int64_t chunk = max_of(kTileItems / p.PW, int64_t(1));
  const bool joined = p.pooled_stride[2] == p.PW * p.pooled_stride[3];
  Buffer<T> tile(band.rows * row_pitch), bins(max_of(kTileItems, p.PW) * kWidth);
  for (int64_t i = 0; i < band.rows * row_pitch; ++i) tile[i] = T(0);
  RoiTaps<T> taps;
  for (int64_t index = 0; index < band.count; ++index) {
    const int64_t k = band.rois[index];
    taps.build(p, rois[k], row_pitch, kWidth);
    const int64_t row_begin = band.row * row_pitch, row_end = (band.row + band.rows) * row_pitch;
    const auto touches = [&](int64_t ph) {
      for (int64_t i = taps.y.begin[ph]; i < taps.y.begin[ph + 1]; ++i)
        if (taps.y.offset[i] >= row_begin && taps.y.offset[i] < row_end) return true;
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
          scatter_bin<Vecs>(tile.data(), taps, r, pw, row_begin, row_end,
                            bins.data() + ((r - first) * p.PW + pw) * kWidth);
    }
  }
  scalar_t* target = static_cast<scalar_t*>(p.map) + band.image * p.map_stride[0] + band.channel * p.map_stride[1];
  for (int64_t r = 0; r < band.rows; ++r)
    store_tile(target + (band.row + r) * p.map_stride[2], tile.data() + r * row_pitch, kWidth, p.map_stride[1],
               p.map_stride[3], band.lanes, p.W);
}

// For every band of every image, the RoIs that touch it: lists[starts[band] .. starts[band + 1]), ascending.
template <typename T>
void list_bands(const RoiAlignParams& p, const Roi<T>* rois, int64_t band_rows, int64_t bands, Buffer<int64_t>& starts,
                Buffer<int64_t>& lists) {
  Buffer<int64_t> low(p.K), high(p.K);
  parallel_for(p.K, 64, [&](int64_t begin, int64_t end) {
    AxisTaps<T> taps;
    for (int64_t k = begin; k < end; ++k) {
      low[k] = 0;
      high[k] = -1;
      if (rois[k].image < 0) continue;
      taps.build(rois[k].y, p.PH, p.H, 1, p.sampling_ratio <= 0, T(1));
      const int64_t count = taps.total(p.PH);
      if (count == 0) continue;
      int64_t least = p.H, most = -1;
      for (int64_t i = 0; i < count; ++i) {
        least = min_of(least, taps.offset[i]);
        most = max_of(most, taps.offset[i]);
      }
      low[k] = rois[k].image * bands + least / band_rows;
      high[k] = rois[k].image * bands + most / band_rows;
    }
  });
  const int64_t total = p.N * bands;
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
  const int64_t wanted = ceil_div(p.H * p.N * blocks, 4 * thread_count());  // rows, for four tasks a thread
  const int64_t fitting = kBandBytes / (p.W * kWidth * int64_t(sizeof(T)));
  const int64_t band_rows = max_of(min_of(min_of(wanted, fitting), p.H), int64_t(1));
  const int64_t bands = ceil_div(p.H, band_rows);
  Buffer<Roi<T>> rois(p.K);
  Buffer<int64_t> starts(p.N * bands + 1);
  Buffer<int64_t> lists;
  decode_rois<T, box_t>(p, rois.data());
  list_bands(p, rois.data(), band_rows, bands, starts, lists);
  parallel_for(p.N * bands * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks, index = task / blocks, row = index % bands * band_rows;
      const Band band{index / bands,
                      row,
                      min_of(band_rows, p.H - row),
                      block * kWidth,
                      min_of(kWidth, p.C - block * kWidth),
                      lists.data() + starts[index],
                      starts[index + 1] - starts[index]};
      switch (ceil_div(band.lanes, kVec)) {
        case 1:
          backward_band<1, scalar_t>(p, rois.data(), band);
          break;
        case 2:
          backward_band<2, scalar_t>(p, rois.data(), band);
          break;
        case 3:
          backward_band<3, scalar_t>(p, rois.data(), band);
          break;
        default:
          backward_band<4, scalar_t>(p, rois.data(), band);
      }
    }
  });
}

}  // namespace

void forward(const RoiAlignParams& p) {
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

void backward(const RoiAlignParams& p) {
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

PVK_CPU_ENTRY(void, forward, RoiAlignParams)
PVK_CPU_ENTRY(void, backward, RoiAlignParams)

}  // namespace pvk::roi_align
