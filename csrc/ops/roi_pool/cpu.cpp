// RoI max pooling on the CPU, forward and backward: SIMD along channels, the maxima and their places side by side.
//
// Results do not depend on the number of threads: an element of the output is found by one thread; an element of the
// map's gradient is summed by one thread, RoIs and bins ascending.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "ops/roi_pool/roi_pool.h"

namespace pvk::roi_pool {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int kMaxVecs = 4;         // vectors of a channel block
constexpr int64_t kSegment = 16;    // columns that are packed together
constexpr int64_t kTileItems = 64;  // bins that are held lane-major at a time, about
constexpr int64_t kShareRois = 16;  // RoIs that are worth another copy of the map

// RoIs by image, ascending: those of image n are order[starts[n] .. starts[n + 1]); from starts[N] on lie those whose
// result is zeros.
template <typename T>
struct Rois {
  Buffer<Roi<T>> roi;
  Buffer<int64_t> order, starts;

  template <typename box_t>
  void decode(const RoiPoolParams& p) {
    roi.reserve(p.K);
    order.reserve(p.K);
    starts.reserve(p.N + 2);
    for (int64_t n = 0; n < p.N + 2; ++n) starts[n] = 0;
    const box_t* boxes = static_cast<const box_t*>(p.boxes);
    for (int64_t k = 0; k < p.K; ++k) {
      const box_t* box = boxes + k * p.boxes_stride[0];
      T value[5];
      for (int i = 0; i < 5; ++i) value[i] = T(to_float(box[i * p.boxes_stride[1]]));
      roi[k] = make_roi<T>(p, value[0], value[1], value[2], value[3], value[4]);
      if (roi[k].image < 0) roi[k].image = p.N;
      ++starts[roi[k].image + 1];
    }
    for (int64_t n = 0; n <= p.N; ++n) starts[n + 1] += starts[n];
    Buffer<int64_t> next(p.N + 1);
    for (int64_t n = 0; n <= p.N; ++n) next[n] = starts[n];
    for (int64_t k = 0; k < p.K; ++k) order[next[roi[k].image]++] = k;
  }
};

// The pixels of every bin row and bin column of one RoI.
struct Bins {
  Buffer<PixelRange> rows, columns;

  template <typename T>
  void build(const RoiPoolParams& p, const Roi<T>& roi) {
    rows.reserve(p.PH);
    columns.reserve(p.PW);
    for (int64_t i = 0; i < p.PH; ++i) rows[i] = bin_range(roi.y, i, p.H);
    for (int64_t i = 0; i < p.PW; ++i) columns[i] = bin_range(roi.x, i, p.W);
  }
};

// ---- forward ----

// The maxima of Vecs * kLanes channels, and their places.
template <int Vecs, typename T>
struct Maxima {
  Vec<T> best[Vecs];
  Mask<T> place[Vecs];

  PVK_INLINE void start(T lowest) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      best[v] = splat(lowest);
      place[v] = Mask<T>{} - 1;
    }
  }
  // The first of equal values wins; NaN never does.
  PVK_INLINE void add(int v, Vec<T> value, Mask<T> here) {
    const Mask<T> greater = value > best[v];
    best[v] = greater ? value : best[v];
    place[v] = greater ? here : place[v];
  }
};

// The features of a channel block: where pixel (0, 0) lies, and how far apart rows and columns are.
template <typename elem_t>
struct Plane {
  const elem_t* data;
  int64_t row_stride, column_stride, width;
};

// Bin rows [begin, end) of one RoI. A bin column at a time: first the maxima of its part of each row, then, from
// these, those of its bins, so that rows under two bins are read once and loops repeat their lengths.
// emit(ph, pw, maxima) gets each bin.
template <int Vecs, typename elem_t, typename T, typename Emit>
PVK_INLINE void pool_bins(const Plane<elem_t>& map, const Bins& bins, int64_t begin, int64_t end, int64_t PW,
                          Maxima<Vecs, T>* lines, const Emit& emit) {
  const int64_t top = bins.rows[begin].begin, bottom = bins.rows[end - 1].end;
  for (int64_t pw = 0; pw < PW; ++pw) {
    const PixelRange columns = bins.columns[pw];
    for (int64_t y = top; y < bottom && columns.begin < columns.end; ++y) {
      const elem_t* pixel = map.data + y * map.row_stride + columns.begin * map.column_stride;
      Mask<T> here = Mask<T>{} + int32_t(y * map.width + columns.begin);
      Maxima<Vecs, T> line;
      line.start(T(kLowest));
      for (int64_t x = columns.begin; x < columns.end; ++x) {
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) line.add(v, load(pixel + v * kLanes<T>), here);
        pixel += map.column_stride;
        here += 1;
      }
      lines[y - top] = line;
    }
    for (int64_t ph = begin; ph < end; ++ph) {
      const PixelRange rows = bins.rows[ph];
      Maxima<Vecs, T> bin;
      if (rows.begin < rows.end && columns.begin < columns.end) {
        bin = lines[rows.begin - top];
        for (int64_t y = rows.begin + 1; y < rows.end; ++y) {
#pragma GCC unroll 4
          for (int v = 0; v < Vecs; ++v) bin.add(v, lines[y - top].best[v], lines[y - top].place[v]);
        }
      } else {
        bin.start(T(0));
      }
      emit(ph, pw, bin);
    }
  }
}

PVK_INLINE void store_places(int32_t* target, Mask<float> places) {
  std::memcpy(target, &places, sizeof(places));
}
PVK_INLINE void store_places(int32_t* target, Mask<double> places) {
  typedef int32_t Narrow __attribute__((vector_size(kRegisterBytes / 2)));
  const Narrow narrow = __builtin_convertvector(places, Narrow);
  std::memcpy(target, &narrow, sizeof(narrow));
}

// Vecs * kLanes channels of one RoI of a channels_last map, straight into channels_last outputs.
template <int Vecs, typename scalar_t, typename T>
void pool_in_place(const RoiPoolParams& p, const scalar_t* image, const Bins& bins, Maxima<kMaxVecs, T>* lines,
                   scalar_t* out, int32_t* argmax) {
  const Plane<scalar_t> plane{image, p.map_stride[2], p.map_stride[3], p.W};
  pool_bins<Vecs, scalar_t, T>(plane, bins, 0, p.PH, p.PW, reinterpret_cast<Maxima<Vecs, T>*>(lines),
                               [&](int64_t ph, int64_t pw, const Maxima<Vecs, T>& bin) {
                                 const int64_t offset = (ph * p.PW + pw) * p.C;
#pragma GCC unroll 4
                                 for (int v = 0; v < Vecs; ++v) {
                                   store(out + offset + v * kLanes<T>, bin.best[v]);
                                   store_places(argmax + offset + v * kLanes<T>, bin.place[v]);
                                 }
                               });
}

// C >= kLanes; a narrow last block overlaps the one before it.
template <typename scalar_t, typename T>
void forward_in_place(const RoiPoolParams& p, const Rois<T>& rois) {
  constexpr int64_t kVec = kLanes<T>;
  parallel_for(rois.starts[p.N], 4, [&](int64_t begin, int64_t end) {
    Bins bins;
    Buffer<Maxima<kMaxVecs, T>> lines(p.H);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = rois.order[i];
      const scalar_t* image = static_cast<const scalar_t*>(p.map) + rois.roi[k].image * p.map_stride[0];
      scalar_t* out = static_cast<scalar_t*>(p.pooled) + k * p.pooled_stride[0];
      int32_t* argmax = p.argmax + k * p.pooled_stride[0];
      bins.build(p, rois.roi[k]);
      int64_t c = 0;
      for (; c + kMaxVecs * kVec <= p.C; c += kMaxVecs * kVec)
        pool_in_place<kMaxVecs>(p, image + c, bins, lines.data(), out + c, argmax + c);
      for (; c < p.C; c += kVec) {
        const int64_t first = min_of(c, p.C - kVec);
        pool_in_place<1>(p, image + first, bins, lines.data(), out + first, argmax + first);
      }
    }
  });
}

// Which runs of kSegment columns of each row one of the RoIs covers: touched[row][segment].
template <typename T>
void mark_touched(const RoiPoolParams& p, const Rois<T>& rois, int64_t begin, int64_t end, uint8_t* touched) {
  const int64_t segments = ceil_div(p.W, kSegment);
  for (int64_t i = 0; i < p.H * segments; ++i) touched[i] = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Roi<T>& roi = rois.roi[rois.order[i]];
    const int64_t top = bin_range(roi.y, 0, p.H).begin, bottom = bin_range(roi.y, p.PH - 1, p.H).end;
    const int64_t left = bin_range(roi.x, 0, p.W).begin, right = bin_range(roi.x, p.PW - 1, p.W).end;
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t s = left / kSegment; s < ceil_div(right, kSegment); ++s) touched[y * segments + s] = 1;
  }
}

// A channel block of RoIs order[begin .. end) of one image, for any strides.
template <int Vecs, typename scalar_t, typename T>
struct PackedBlock {
  static constexpr int64_t kWidth = Vecs * kLanes<T>;
  const RoiPoolParams& p;
  const Rois<T>& rois;
  int64_t image, channel, lanes, begin, end;

  // Copies the channels, pixel-major, where RoIs cover the map.
  void pack(T* packed) const {
    const int64_t segments = ceil_div(p.W, kSegment);
    Buffer<uint8_t> touched(p.H * segments);
    mark_touched(p, rois, begin, end, touched.data());
    const scalar_t* map = static_cast<const scalar_t*>(p.map) + image * p.map_stride[0] + channel * p.map_stride[1];
    for (int64_t y = 0; y < p.H; ++y) {
      const uint8_t* flags = &touched[y * segments];
      for (int64_t s = 0; s < segments; ++s) {
        if (!flags[s]) continue;
        const int64_t x = s * kSegment;
        while (s + 1 < segments && flags[s + 1]) ++s;
        load_tile(packed + (y * p.W + x) * kWidth, kWidth, map + y * p.map_stride[2] + x * p.map_stride[3],
                  p.map_stride[1], p.map_stride[3], lanes, min_of((s + 1) * kSegment, p.W) - x);
      }
    }
  }

  void run() const {
    Buffer<T> packed(p.H * p.W * kWidth);
    pack(packed.data());
    const Plane<T> plane{packed.data(), p.W * kWidth, kWidth, p.W};
    const int64_t rows = max_of(kTileItems / p.PW, int64_t(1));
    Buffer<T> tile(rows * p.PW * kWidth);
    Buffer<int32_t> places(rows * p.PW * kWidth);
    Buffer<float> staged(rows * p.PW * kWidth * int64_t(sizeof(T) / sizeof(float)));
    Buffer<Maxima<Vecs, T>> lines(p.H);
    Bins bins;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = rois.order[i];
      bins.build(p, rois.roi[k]);
      for (int64_t first = 0; first < p.PH; first += rows) {
        const int64_t stop = min_of(first + rows, p.PH);
        pool_bins<Vecs, T, T>(plane, bins, first, stop, p.PW, lines.data(),
                              [&](int64_t ph, int64_t pw, const Maxima<Vecs, T>& bin) {
                                const int64_t item = ((ph - first) * p.PW + pw) * kWidth;
#pragma GCC unroll 4
                                for (int v = 0; v < Vecs; ++v) {
                                  store(&tile[item + v * kLanes<T>], bin.best[v]);
                                  store_places(&places[item + v * kLanes<T>], bin.place[v]);
                                }
                              });
        const int64_t offset = k * p.pooled_stride[0] + channel * p.pooled_stride[1] + first * p.pooled_stride[2];
        const int64_t items = (stop - first) * p.PW;
        unload(static_cast<scalar_t*>(p.pooled) + offset, tile.data(), reinterpret_cast<scalar_t*>(staged.data()),
               items);
        // Places are moved as the bits of floats.
        unload(reinterpret_cast<float*>(p.argmax + offset), reinterpret_cast<float*>(places.data()), staged.data(),
               items);
      }
    }
  }

  // Where the block's outputs are one piece of memory it is written in one sweep: short pieces at a stride cost more
  // than the pooling.
  template <typename out_t, typename tile_t>
  void unload(out_t* target, const tile_t* tile, out_t* staged, int64_t items) const {
    const bool is_piece = p.pooled_stride[3] == 1 && p.pooled_stride[1] == items;
    out_t* to = is_piece ? staged : target;
    // A few items beyond whole squares go one by one: less work than another square.
    const int64_t rest = items % kLanes<tile_t>, squares = rest <= kLanes<tile_t> / 4 ? items - rest : items;
    store_tile(to, tile, kWidth, p.pooled_stride[1], p.pooled_stride[3], lanes, squares);
    store_tile(to + squares * p.pooled_stride[3], tile + squares * kWidth, kWidth, p.pooled_stride[1],
               p.pooled_stride[3], lanes, items - squares);
    if (is_piece) std::memcpy(target, staged, uint64_t(lanes * items) * sizeof(out_t));
  }
};

// Any strides. A task is a channel block of one image, and a share of its RoIs where blocks are few.
template <typename scalar_t, typename T>
void forward_packed(const RoiPoolParams& p, const Rois<T>& rois) {
  constexpr int64_t kWidth = kMaxVecs * kLanes<T>;
  const int64_t blocks = ceil_div(p.C, kWidth);
  const int64_t shares = min_of(ceil_div(2 * thread_count(), p.N * blocks), ceil_div(p.K, kShareRois));
  parallel_for(p.N * blocks * shares, 1, [&](int64_t first, int64_t stop) {
    for (int64_t task = first; task < stop; ++task) {
      const int64_t share = task % shares, block = task / shares % blocks, image = task / shares / blocks;
      const int64_t start = rois.starts[image], count = rois.starts[image + 1] - start;
      const int64_t begin = start + count * share / shares, end = start + count * (share + 1) / shares;
      const int64_t channel = block * kWidth, lanes = min_of(kWidth, p.C - channel);
      if (begin == end) continue;
      switch (ceil_div(lanes, int64_t(kLanes<T>))) {
        case 1:
          PackedBlock<1, scalar_t, T>{p, rois, image, channel, lanes, begin, end}.run();
          break;
        case 2:
          PackedBlock<2, scalar_t, T>{p, rois, image, channel, lanes, begin, end}.run();
          break;
        case 3:
          PackedBlock<3, scalar_t, T>{p, rois, image, channel, lanes, begin, end}.run();
          break;
        default:
          PackedBlock<4, scalar_t, T>{p, rois, image, channel, lanes, begin, end}.run();
      }
    }
  });
}

template <typename scalar_t, typename box_t>
void forward_typed(const RoiPoolParams& p) {
  using T = opmath_t<scalar_t>;
  Rois<T> rois;
  rois.template decode<box_t>(p);
  const int64_t size = p.C * p.PH * p.PW;
  for (int64_t i = rois.starts[p.N]; i < p.K; ++i) {
    scalar_t* out = static_cast<scalar_t*>(p.pooled) + rois.order[i] * size;
    int32_t* argmax = p.argmax + rois.order[i] * size;
    for (int64_t j = 0; j < size; ++j) {
      out[j] = from_float<scalar_t>(T(0));
      argmax[j] = -1;
    }
  }
  if (p.N == 0) return;
  if (p.channels_last && p.map_stride[1] == 1 && p.C >= kLanes<T>) return forward_in_place<scalar_t>(p, rois);
  forward_packed<scalar_t>(p, rois);
}

// ---- backward ----

constexpr int64_t kTileBytes = 1 << 20;  // of the map's gradient that a task of channels_last adds to, about

// The gradient of up to `width` channels of one image, pixel-major in `tile`: RoIs ascending, bins ascending.
template <typename scalar_t, typename T>
void scatter_block(const RoiPoolParams& p, const Rois<T>& rois, int64_t image, int64_t channel, int64_t lanes,
                   int64_t width, T* tile) {
  const uint64_t pixels = uint64_t(p.H * p.W);
  const auto add = [&](const scalar_t* gradient, const int32_t* argmax, int64_t lane) {
    const uint64_t place = uint64_t(int64_t(*argmax));
    if (place < pixels) tile[int64_t(place) * width + lane] += T(to_float(*gradient));  // not -1
  };
  for (int64_t i = rois.starts[image]; i < rois.starts[image + 1]; ++i) {
    const int64_t k = rois.order[i];
    const scalar_t* gradient =
        static_cast<const scalar_t*>(p.pooled) + k * p.pooled_stride[0] + channel * p.pooled_stride[1];
    const int32_t* argmax = p.argmax + k * p.argmax_stride[0] + channel * p.argmax_stride[1];
    if (p.argmax_stride[1] == 1) {
      for (int64_t ph = 0; ph < p.PH; ++ph)
        for (int64_t pw = 0; pw < p.PW; ++pw)
          for (int64_t lane = 0; lane < lanes; ++lane)
            add(gradient + ph * p.pooled_stride[2] + pw * p.pooled_stride[3] + lane * p.pooled_stride[1],
                argmax + ph * p.argmax_stride[2] + pw * p.argmax_stride[3] + lane, lane);
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t ph = 0; ph < p.PH; ++ph) {
          const scalar_t* from = gradient + lane * p.pooled_stride[1] + ph * p.pooled_stride[2];
          const int32_t* places = argmax + lane * p.argmax_stride[1] + ph * p.argmax_stride[2];
          for (int64_t pw = 0; pw < p.PW; ++pw)
            add(from + pw * p.pooled_stride[3], places + pw * p.argmax_stride[3], lane);
        }
    }
  }
}

template <typename scalar_t, typename box_t>
void backward_typed(const RoiPoolParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kVec = kLanes<T>;
  Rois<T> rois;
  rois.template decode<box_t>(p);
  // Where channels are neighbours, as many as the cache holds of the map are read in one run.
  const int64_t held = kTileBytes / (p.H * p.W * int64_t(sizeof(T))) / kVec * kVec;
  const int64_t width = p.argmax_stride[1] == 1 ? max_of(kVec, min_of(held, 8 * kVec)) : kVec;
  const int64_t blocks = ceil_div(p.C, width);
  parallel_for(p.N * blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> tile(p.H * p.W * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, channel = task % blocks * width;
      const int64_t lanes = min_of(width, p.C - channel);
      for (int64_t i = 0; i < p.H * p.W * width; ++i) tile[i] = T(0);
      scatter_block<scalar_t>(p, rois, image, channel, lanes, width, tile.data());
      scalar_t* target = static_cast<scalar_t*>(p.map) + image * p.map_stride[0] + channel * p.map_stride[1];
      for (int64_t y = 0; y < p.H; ++y)
        store_tile(target + y * p.map_stride[2], tile.data() + y * p.W * width, width, p.map_stride[1], p.map_stride[3],
                   lanes, p.W);
    }
  });
}

}  // namespace

void forward(const RoiPoolParams& p) {
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

void backward(const RoiPoolParams& p) {
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

PVK_CPU_ENTRY(void, forward, RoiPoolParams)
PVK_CPU_ENTRY(void, backward, RoiPoolParams)

}  // namespace pvk::roi_pool
