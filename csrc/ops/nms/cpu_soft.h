// Soft NMS on the CPU: groups over threads. Within a group, boxes near each other share a chunk of kLanes; each step
// selects the best score, and decays the scores in the chunks whose bounds the selected box meets.
#pragma once

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/radix_sort.h"
#include "core/simd.h"
#include "ops/nms/cpu_groups.h"
#include "ops/nms/cpu_iou.h"
#include "ops/nms/cpu_sort.h"
#include "ops/nms/nms.h"

namespace pvk::nms::PVK_ISA {

using namespace pvk::PVK_ISA;

// kLanes boxes that compete; a lane that is selected, dropped or unused has score -inf.
template <typename T>
struct SoftChunk {
  T x1[kLanes<T>], y1[kLanes<T>], x2[kLanes<T>], y2[kLanes<T>], area[kLanes<T>], score[kLanes<T>];
  int64_t index[kLanes<T>];
};

template <typename T>
T largest(Vec<T> values) {
  T lanes[kLanes<T>];
  store(lanes, values);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] = max_of(lanes[lane], lanes[lane + half]);
  return lanes[0];
}

// As exp_of_negative of nms.h, with the same roundings; of NaN 0.
PVK_INLINE Vec<double> exp_of_negative(Vec<double> exact) {
  typedef int32_t Exponents __attribute__((vector_size(kRegisterBytes / 2)));
  const Mask<double> inside = exact > kLowestExponent;
  const Vec<double> x = inside ? exact : splat(kLowestExponent);
  const Exponents k = __builtin_convertvector(x * kLog2E + -0.5, Exponents);
  const Vec<double> whole = __builtin_convertvector(k, Vec<double>);
  const Vec<double> r = x - whole * kLn2High - whole * kLn2Low;
  const auto step = [&](Vec<double> sum, double c) __attribute__((always_inline)) { return sum * r + c; };
  const Vec<double> sum = exp_series(Vec<double>{}, step);
  const Exponents half = k / 2;
  const Vec<double> first = (Vec<double>)((__builtin_convertvector(half, Mask<double>) + 1023) << 52);
  const Vec<double> second = (Vec<double>)((__builtin_convertvector(k - half, Mask<double>) + 1023) << 52);
  return inside ? sum * first * second : Vec<double>{};
}

PVK_INLINE Vec<double> gaussian(Vec<double> iou, double sigma) {
  return exp_of_negative(-(iou * iou / sigma));
}
PVK_INLINE Vec<float> gaussian(Vec<float> iou, double sigma) {
  typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
  Half halves[2];
  std::memcpy(halves, &iou, sizeof(iou));
  for (Half& half : halves)
    half = __builtin_convertvector(gaussian(__builtin_convertvector(half, Vec<double>), sigma), Half);
  std::memcpy(&iou, halves, sizeof(iou));
  return iou;
}

// The boxes of one group.
template <typename scalar_t>
class SoftGroup {
  using T = opmath_t<scalar_t>;
  static constexpr int kL = kLanes<T>;
  static constexpr T kInfinity = __builtin_inf();

 public:
  explicit SoftGroup(const SoftNmsParams& p) : p_(p), threshold_(floor_to<T>(p.iou_threshold)) {}

  // Writes the score with which each box is selected; those that never are keep what they have.
  void run(const int64_t* members, int64_t count) {
    place(members, count);
    T* const decayed = static_cast<T*>(p_.decayed);
    for (int64_t step = 0; step < count; ++step) {
      Vec<T> top = splat(-kInfinity);
      for (int64_t c = 0; c < chunks_; c += kL) top = max_vec(top, load(&best_[c]));
      const T score = largest<T>(top);
      if (!(double(score) > p_.score_threshold)) return;
      const int64_t selected = find(score);
      SoftChunk<T>& chunk = chunk_[selected / kL];
      const int lane = int(selected % kL);
      decayed[chunk.index[lane]] = score;
      chunk.score[lane] = -kInfinity;
      best_[selected / kL] = largest<T>(load(chunk.score));
      decay_near({chunk.x1[lane], chunk.y1[lane], chunk.x2[lane], chunk.y2[lane], chunk.area[lane]});
    }
  }

 private:
  // A box that overlaps none, or has an IoU of 0 or NaN with all, becomes an empty one.
  Box<T> load_box(int64_t index) const {
    const scalar_t* const box = static_cast<const scalar_t*>(p_.boxes) + index * p_.boxes_stride[0];
    const auto value = [&](int64_t column) { return T(to_float(box[column * p_.boxes_stride[1]])); };
    const Box<T> b = {value(0), value(1), value(2), value(3), (value(2) - value(0)) * (value(3) - value(1))};
    const bool can_overlap = b.x2 > b.x1 && b.y2 > b.y1 && b.area < kInfinity;
    return can_overlap ? b : Box<T>{kInfinity, kInfinity, -kInfinity, -kInfinity, T(0)};
  }

  // Sorts the members along a curve through the plane and cuts them in chunks.
  void place(const int64_t* members, int64_t count) {
    chunks_ = ceil_div(count, int64_t(kL));
    boxes_.reserve(count);
    at_.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      boxes_[i] = load_box(members[i]);
      at_[i] = i;
    }
    if (count > 2 * kL) sort_along_curve(count);

    const int64_t padded = ceil_div(chunks_, int64_t(kL)) * kL;
    chunk_.reserve(chunks_);
    x1_.reserve(padded);
    y1_.reserve(padded);
    x2_.reserve(padded);
    y2_.reserve(padded);
    best_.reserve(padded);
    for (int64_t c = 0; c < padded; ++c) {
      x1_[c] = y1_[c] = kInfinity;
      x2_[c] = y2_[c] = best_[c] = -kInfinity;
    }
    const scalar_t* const scores = static_cast<const scalar_t*>(p_.scores);
    for (int64_t slot = 0; slot < chunks_ * kL; ++slot) {
      const int64_t c = slot / kL, lane = slot % kL;
      SoftChunk<T>& chunk = chunk_[c];
      const Box<T> box = slot < count ? boxes_[at_[slot]] : Box<T>{kInfinity, kInfinity, -kInfinity, -kInfinity, T(0)};
      chunk.x1[lane] = box.x1;
      chunk.y1[lane] = box.y1;
      chunk.x2[lane] = box.x2;
      chunk.y2[lane] = box.y2;
      chunk.area[lane] = box.area;
      chunk.index[lane] = slot < count ? members[at_[slot]] : -1;
      chunk.score[lane] = slot < count ? T(to_float(scores[members[at_[slot]] * p_.scores_stride])) : -kInfinity;
      x1_[c] = min_of(x1_[c], box.x1);
      y1_[c] = min_of(y1_[c], box.y1);
      x2_[c] = max_of(x2_[c], box.x2);
      y2_[c] = max_of(y2_[c], box.y2);
      best_[c] = max_of(best_[c], chunk.score[lane]);
    }
  }

  // Z-order of the centres on a grid of 1024 x 1024. It affects time only.
  void sort_along_curve(int64_t count) {
    double low_x = __builtin_inf(), low_y = low_x, high_x = -low_x, high_y = -low_x;
    const auto center = [](T low, T high) { return double(low) / 2 + double(high) / 2; };
    const auto overlaps = [](const Box<T>& box) { return box.x2 > box.x1; };
    for (int64_t i = 0; i < count; ++i) {
      const Box<T>& box = boxes_[i];
      if (!overlaps(box)) continue;
      low_x = min_of(low_x, center(box.x1, box.x2));
      high_x = max_of(high_x, center(box.x1, box.x2));
      low_y = min_of(low_y, center(box.y1, box.y2));
      high_y = max_of(high_y, center(box.y1, box.y2));
    }
    const double side = max_of(max_of(high_x - low_x, high_y - low_y), 1e-30);
    const auto spread = [](uint32_t bits) {
      bits = (bits | bits << 8) & 0x00ff00ff;
      bits = (bits | bits << 4) & 0x0f0f0f0f;
      bits = (bits | bits << 2) & 0x33333333;
      return (bits | bits << 1) & 0x55555555;
    };
    keys_.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const Box<T>& box = boxes_[i];
      if (!overlaps(box)) {
        keys_[i] = ~0u;
        continue;
      }
      const uint32_t x = uint32_t((center(box.x1, box.x2) - low_x) / side * 1023);
      const uint32_t y = uint32_t((center(box.y1, box.y2) - low_y) / side * 1023);
      keys_[i] = spread(y) << 1 | spread(x);
    }
    radix_sort(keys_, at_, count);
  }

  // The slot of the lowest index with this score.
  int64_t find(T score) const {
    int64_t slot = -1, lowest = 0;
    for (int64_t c = 0; c < chunks_; c += kL) {
      if (!any<T>(load(&best_[c]) == splat(score))) continue;
      for (int64_t i = c; i < min_of(c + kL, chunks_); ++i) {
        if (best_[i] != score) continue;
        for (int lane = 0; lane < kL; ++lane) {
          const int64_t index = chunk_[i].index[lane];
          if (chunk_[i].score[lane] != score || (slot >= 0 && index > lowest)) continue;
          slot = i * kL + lane;
          lowest = index;
        }
      }
    }
    return slot;
  }

  void decay_near(const Box<T>& box) {
    for (int64_t c = 0; c < chunks_; c += kL) {
      const Mask<T> meets = (load(&x1_[c]) < splat(box.x2)) & (load(&x2_[c]) > splat(box.x1)) &
                            (load(&y1_[c]) < splat(box.y2)) & (load(&y2_[c]) > splat(box.y1)) &
                            (load(&best_[c]) > splat(-kInfinity));
      if (!any<T>(meets)) continue;
      for (int lane = 0; lane < kL; ++lane)
        if (meets[lane]) decay_chunk(c + lane, box);
    }
  }

  void decay_chunk(int64_t c, const Box<T>& box) {
    SoftChunk<T>& chunk = chunk_[c];
    const Vec<T> zero{};
    const Vec<T> w = min_vec(load(chunk.x2), splat(box.x2)) - max_vec(load(chunk.x1), splat(box.x1));
    const Vec<T> h = min_vec(load(chunk.y2), splat(box.y2)) - max_vec(load(chunk.y1), splat(box.y1));
    const Mask<T> overlap = (w > zero) & (h > zero) & (load(chunk.score) > splat(-kInfinity));
    if (!any<T>(overlap)) return;
    const Vec<T> inter = w * h;
    const Vec<T> iou = inter / (splat(box.area) + load(chunk.area) - inter);
    // As decay() of nms.h.
    const Vec<T> score = load(chunk.score);
    const Mask<T> concerned = overlap & (p_.gaussian ? iou > zero : (iou > zero) & (iou > splat(threshold_)));
    const Vec<T> factor = p_.gaussian ? gaussian(iou, p_.sigma) : splat(T(1)) - iou;
    const Vec<T> decayed = concerned ? score * factor : score;
    store(chunk.score, decayed);
    best_[c] = largest<T>(max_vec(splat(-kInfinity), decayed));
  }

  const SoftNmsParams& p_;
  const T threshold_;  // of linear decay
  int64_t chunks_ = 0;
  Buffer<SoftChunk<T>> chunk_;
  Buffer<T> x1_, y1_, x2_, y2_, best_;  // of each chunk: bounds, and the best score
  Buffer<Box<T>> boxes_;                // of each member
  Buffer<int64_t> at_;                  // members in the order of the chunks
  Buffer<uint32_t> keys_;
};

template <typename scalar_t>
void soft_decay_typed(const SoftNmsParams& p) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const scores = static_cast<const scalar_t*>(p.scores);
  T* const decayed = static_cast<T*>(p.decayed);
  Buffer<int64_t> members(p.N);
  int64_t count = 0;
  for (int64_t i = 0; i < p.N; ++i) {
    decayed[i] = T(-__builtin_inf());
    if (double(T(to_float(scores[i * p.scores_stride]))) > p.score_threshold) members[count++] = i;
  }
  if (p.groups == nullptr) {
    SoftGroup<scalar_t>(p).run(members.data(), count);
    return;
  }
  // A counting sort by group.
  GroupTable table;
  table.clear();
  Buffer<int64_t> group_of(count), starts(count + 2), sorted(count);
  for (int64_t i = 0; i < count; ++i)
    group_of[i] = table.id_of(load_group(p.groups, p.group_bytes, members[i] * p.groups_stride));
  const int64_t groups = table.count();
  for (int64_t g = 0; g < groups + 2; ++g) starts[g] = 0;
  for (int64_t i = 0; i < count; ++i) ++starts[group_of[i] + 2];
  for (int64_t g = 0; g < groups; ++g) starts[g + 2] += starts[g + 1];
  for (int64_t i = 0; i < count; ++i) sorted[starts[group_of[i] + 1]++] = members[i];
  // Fewer boxes in a piece are not worth another thread.
  constexpr int64_t kBoxes = 512;
  const int64_t pieces = min_of(8 * thread_count(), ceil_div(count, kBoxes));
  parallel_for(groups, ceil_div(groups, max_of(pieces, int64_t(1))), [&](int64_t begin, int64_t end) {
    SoftGroup<scalar_t> group(p);
    for (int64_t g = begin; g < end; ++g) group.run(&sorted[starts[g]], starts[g + 1] - starts[g]);
  });
}

template <typename scalar_t>
void soft_finish_typed(const SoftNmsParams& p) {
  using T = opmath_t<scalar_t>;
  const T* const decayed = static_cast<const T*>(p.decayed);
  scalar_t* const kept_scores = static_cast<scalar_t*>(p.kept_scores);
  Order<T> order;
  order.sort(p.N, [&](int64_t i) { return decayed[i]; });
  const int64_t count = order.count_present(p.N);
  for (int64_t rank = 0; rank < count; ++rank) {
    p.keep[rank] = order.order[rank];
    kept_scores[rank] = from_float<scalar_t>(decayed[order.order[rank]]);
  }
  p.count[0] = count;
}

}  // namespace pvk::nms::PVK_ISA
