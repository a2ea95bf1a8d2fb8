// RoI align on the CPU: what forward and backward share, namely RoIs and the pixels that their bins touch.
#pragma once

#include "core/buffer.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/radix_sort.h"
#include "core/simd.h"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int kMaxVecs = 4;         // vectors of a channel block
constexpr int64_t kTileItems = 64;  // bins that are held lane-major at a time, about

// A row (or column) of the map, or where its elements begin, and its weight in a bin.
template <typename T>
struct AxisTap {
  int64_t pixel;
  T weight;
};

// The taps of every bin along one axis: bin p has taps [begin[p], begin[p + 1]), of pixels that differ.
template <typename T>
struct AxisTaps {
  const int64_t* begin;
  const AxisTap<T>* taps;
};

template <typename T>
struct RoiTaps {
  AxisTaps<T> y, x;
};

// Finds the taps of one axis, and holds them until the next.
template <typename T>
struct AxisFinder {
  Buffer<int64_t> begin;
  Buffer<AxisTap<T>> taps;
  int64_t count = 0;

  AxisTaps<T> find(const RoiAxis<T>& axis, int64_t bins, int64_t size, bool adaptive, T scale, int64_t stride = 1) {
    int64_t bound = 0;
    begin.reserve(bins + 1);
    for (int64_t p = 0; p < bins; ++p) {
      const SampleRange range = sample_range(axis, p, size, adaptive);
      bound += 2 * (range.end - range.begin);
    }
    taps.reserve(bound);
    count = 0;
    for (int64_t p = 0; p < bins; ++p) {
      const int64_t first = begin[p] = count;
      const auto add = [&](int64_t pixel, T weight) {
        if (weight == T(0)) return;
        for (int64_t earlier = count - 1; earlier >= first && earlier >= count - 2; --earlier) {
          if (taps[earlier].pixel == pixel) {
            taps[earlier].weight += weight;
            return;
          }
        }
        taps[count++] = {pixel, weight};
      };
      const SampleRange range = sample_range(axis, p, size, adaptive);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const Tap<T> tap = make_tap(sample_position(axis, p, i), size);
        add(tap.low * stride, tap.low_weight * scale);
        add(tap.high * stride, tap.high_weight * scale);
      }
    }
    begin[bins] = count;
    return {begin.data(), taps.data()};
  }
};

template <typename T>
struct TapFinder {
  AxisFinder<T> y, x;

  RoiTaps<T> find(const RoiAlignParams& p, const Roi<T>& roi, int64_t row_stride = 1, int64_t column_stride = 1) {
    const bool adaptive = p.sampling_ratio <= 0;
    const Level& level = p.levels[roi.level];
    return {y.find(roi.y, p.PH, level.H, adaptive, roi.inverse_count, row_stride),
            x.find(roi.x, p.PW, level.W, adaptive, T(1), column_stride)};
  }
};

// The taps of all RoIs, found once; a RoI without a result has none.
template <typename T>
class TapTable {
 public:
  void build(const RoiAlignParams& p, const Roi<T>* rois) {
    PH_ = p.PH;
    bins_ = p.PH + p.PW + 2;
    starts_.reserve(p.K + 1);
    begins_.reserve(p.K * bins_);
    starts_[0] = 0;
    for_each(p, rois, [&](int64_t k, const TapFinder<T>& found) { starts_[k + 1] = found.y.count + found.x.count; });
    for (int64_t k = 0; k < p.K; ++k) starts_[k + 1] += starts_[k];
    taps_.reserve(starts_[p.K]);
    for_each(p, rois, [&](int64_t k, const TapFinder<T>& found) {
      int64_t* begins = begins_.data() + k * bins_;
      AxisTap<T>* taps = taps_.data() + starts_[k];
      for (int64_t i = 0; i <= p.PH; ++i) begins[i] = found.y.begin[i];
      for (int64_t i = 0; i <= p.PW; ++i) begins[p.PH + 1 + i] = found.x.begin[i];
      for (int64_t i = 0; i < found.y.count; ++i) taps[i] = found.y.taps[i];
      for (int64_t i = 0; i < found.x.count; ++i) taps[found.y.count + i] = found.x.taps[i];
    });
  }

  RoiTaps<T> at(int64_t k) const {
    const int64_t* begins = &begins_[k * bins_];
    const AxisTap<T>* taps = &taps_[starts_[k]];
    return {{begins, taps}, {begins + PH_ + 1, taps + begins[PH_]}};
  }

 private:
  template <typename Take>
  static void for_each(const RoiAlignParams& p, const Roi<T>* rois, const Take& take) {
    parallel_for(p.K, 32, [&](int64_t begin, int64_t end) {
      TapFinder<T> finder;
      for (int64_t k = begin; k < end; ++k) {
        if (rois[k].image < 0) {
          finder.y.find({T(0), T(0), T(0)}, p.PH, 0, false, T(0));
          finder.x.find({T(0), T(0), T(0)}, p.PW, 0, false, T(0));
        } else {
          finder.find(p, rois[k]);
        }
        take(k, finder);
      }
    });
  }

  int64_t PH_ = 0, bins_ = 0;  // begins_ has PH + 1 and PW + 1 of each RoI
  Buffer<int64_t> starts_, begins_;
  Buffer<AxisTap<T>> taps_;
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

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::roi_align
