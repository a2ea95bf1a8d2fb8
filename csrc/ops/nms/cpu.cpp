// NMS on the CPU: images over threads. The boxes of an image in descending score, each against the boxes of its group
// that are kept so far, kLanes at a time, until enough are kept.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/nms/cpu_groups.h"
#include "ops/nms/cpu_iou.h"
#include "ops/nms/cpu_kept.h"
#include "ops/nms/cpu_soft.h"
#include "ops/nms/cpu_sort.h"
#include "ops/nms/nms.h"

namespace pvk::nms {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

// What a thread needs for an image; the next one reuses it.
template <typename T>
struct Workspace {
  Order<T> order;
  Buffer<Box<T>> boxes;      // in that order
  Buffer<int64_t> group_of;  // each of them
  GroupTable groups;
  Buffer<Field> fields;  // of each group
  KeptBoxes<T> kept;
  Buffer<int64_t> kept_at;
};

// The number of boxes that stay; `keep_box` takes the place in the order of each.
template <typename T, typename Keep>
int64_t select(const NmsParams& p, Workspace<T>& w, int64_t present, const Keep& keep_box) {
  int64_t kept = 0;
  if (p.iou_threshold < 0) {
    w.kept_at.reserve(min_of(present, p.max_output));
    for (int64_t i = 0; i < present && kept < p.max_output; ++i) {
      bool suppressed = false;
      for (int64_t k = 0; k < kept && !suppressed; ++k) {
        const int64_t j = w.kept_at[k];
        if (p.groups != nullptr && w.group_of[i] != w.group_of[j]) continue;
        suppressed = suppresses_any_threshold(w.boxes[j], w.boxes[i], p.iou_threshold);
      }
      if (suppressed) continue;
      w.kept_at[kept] = i;
      keep_box(kept++, i);
    }
    return kept;
  }
  const Threshold<T> threshold(p.iou_threshold);
  const int64_t groups = p.groups != nullptr ? w.groups.count() : 1;
  w.fields.reserve(groups);
  for (int64_t g = 0; g < groups; ++g) w.fields[g] = Field{};
  if (p.groups != nullptr) {
    for (int64_t i = 0; i < present; ++i) ++w.fields[w.group_of[i]].awaited;
  } else {
    w.fields[0].awaited = present;
  }
  const int64_t* const group_of = p.groups != nullptr ? w.group_of.data() : nullptr;
  w.kept.start(w.fields, groups, w.boxes.data(), group_of, present, p.iou_threshold);
  for (int64_t i = 0; i < present && kept < p.max_output; ++i) {
    Field& field = w.fields[group_of != nullptr ? group_of[i] : 0];
    --field.awaited;
    if (w.kept.suppresses(field, w.boxes[i], threshold)) continue;
    if (field.awaited > 0) w.kept.keep(field, w.boxes[i]);
    keep_box(kept++, i);
  }
  return kept;
}

template <typename scalar_t>
void suppress_image(const NmsParams& p, int64_t image, Workspace<opmath_t<scalar_t>>& w) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const scores = static_cast<const scalar_t*>(p.scores) + image * p.scores_stride[0];
  w.order.sort(p.N, [&](int64_t i) { return T(to_float(scores[i * p.scores_stride[1]])); });
  const int64_t present = p.padded ? w.order.count_present(p.N) : p.N;

  const scalar_t* const source = static_cast<const scalar_t*>(p.boxes) + image * p.boxes_stride[0];
  w.boxes.reserve(present);
  for (int64_t i = 0; i < present; ++i) {
    const scalar_t* box = source + w.order.order[i] * p.boxes_stride[1];
    const auto value = [&](int64_t column) { return T(to_float(box[column * p.boxes_stride[2]])); };
    w.boxes[i] = {value(0), value(1), value(2), value(3), (value(2) - value(0)) * (value(3) - value(1))};
  }
  if (p.groups != nullptr) {
    w.group_of.reserve(present);
    w.groups.clear();
    for (int64_t i = 0; i < present; ++i) {
      const int64_t place = image * p.groups_stride[0] + w.order.order[i] * p.groups_stride[1];
      w.group_of[i] = w.groups.id_of(load_group(p.groups, p.group_bytes, place));
    }
  }

  int64_t* const keep = p.keep + image * p.max_output;
  const int64_t kept = select(p, w, present, [&](int64_t rank, int64_t i) { keep[rank] = w.order.order[i]; });
  p.count[image] = kept;
  if (p.padded)
    for (int64_t rank = kept; rank < p.max_output; ++rank) keep[rank] = -1;
}

template <typename scalar_t>
void forward_typed(const NmsParams& p) {
  // Fewer boxes in a piece are not worth another thread.
  constexpr int64_t kBoxes = 1024;
  const int64_t images = max_of(p.B / (4 * thread_count()), ceil_div(kBoxes, p.N));
  parallel_for(p.B, images, [&](int64_t begin, int64_t end) {
    Workspace<opmath_t<scalar_t>> workspace;
    for (int64_t image = begin; image < end; ++image) suppress_image<scalar_t>(p, image, workspace);
  });
}

}  // namespace

void forward(const NmsParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { forward_typed<decltype(scalar)>(p); });
}

void soft_decay(const SoftNmsParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { soft_decay_typed<decltype(scalar)>(p); });
}

void soft_finish(const SoftNmsParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { soft_finish_typed<decltype(scalar)>(p); });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, NmsParams)
PVK_CPU_ENTRY(void, soft_decay, SoftNmsParams)
PVK_CPU_ENTRY(void, soft_finish, SoftNmsParams)
#if defined(PVK_ISA_BASELINE)
bool sorts_scores() {
  return true;
}
int64_t scratch_bytes(int64_t, int64_t) {
  return 0;
}
int64_t soft_scratch_bytes(int64_t, DType) {
  return 0;
}
int64_t read_count(const int64_t* count, Stream) {
  return *count;
}
#endif

}  // namespace pvk::nms
