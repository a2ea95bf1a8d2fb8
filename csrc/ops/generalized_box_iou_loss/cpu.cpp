// Losses of box regression on the CPU: kLanes pairs at a time, each read once and written once.
//
// A reduced loss is a sum over blocks of fixed size, added in order, with the rounding carried along: it does not
// depend on the number of threads.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "ops/box_iou/simd_boxes.h"
#include "ops/generalized_box_iou_loss/generalized_box_iou_loss.h"

namespace pvk::generalized_box_iou_loss {
namespace PVK_ISA {
namespace {

using namespace pvk::box_iou;
using namespace pvk::box_iou::PVK_ISA;

constexpr int64_t kBlock = 512;      // pairs whose losses are added up together
constexpr int64_t kPieceBlocks = 4;  // less is not worth a thread

// kLanes pairs from i on, fewer at the end: the other lanes are boxes of zeros.
template <typename scalar_t, Kind kKind>
struct Lanes {
  using T = opmath_t<scalar_t>;
  Vec<T> c1[4], c2[4];
  Box<Vec<T>> a, b;

  PVK_INLINE Lanes(const LossParams& p, int64_t i, const Constants<Vec<T>>& constants) {
    load_boxes<scalar_t, T>(static_cast<const scalar_t*>(p.boxes1) + i * p.boxes1_stride[0], p.boxes1_stride[0],
                            p.boxes1_stride[1], p.N - i, c1);
    load_boxes<scalar_t, T>(static_cast<const scalar_t*>(p.boxes2) + i * p.boxes2_stride[0], p.boxes2_stride[0],
                            p.boxes2_stride[1], p.N - i, c2);
    a = prepare_box<kKind, T>(Format::kXyxy, c1, constants);
    b = prepare_box<kKind, T>(Format::kXyxy, c2, constants);
  }
};

// [0, count) of kLanes numbers.
template <typename T>
PVK_INLINE void store_some(T* target, Vec<T> value, int64_t count) {
  std::memcpy(target, &value, size_t(min_of(count, int64_t(kLanes<T>))) * sizeof(T));
}

template <typename scalar_t, Kind kKind>
void forward_kind(const LossParams& p) {
  using T = opmath_t<scalar_t>;
  const Constants<Vec<T>> constants = constants_of<T>(p.union_eps, p.enclosing_eps, p.alpha_eps);
  const bool reduced = p.reduction != Reduction::kNone;
  T* const loss = static_cast<T*>(p.loss);
  const int64_t blocks = ceil_div(p.N, kBlock);
  Buffer<T> sums(reduced ? blocks : 0);
  parallel_for(blocks, kPieceBlocks, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = min_of((block + 1) * kBlock, p.N);
      T lanes[kLanes<T>];
      CarefulSum<Vec<T>> sum;
      for (int64_t i = block * kBlock; i < end; i += kLanes<T>) {
        const Lanes<scalar_t, kKind> pairs(p, i, constants);
        Vec<T> value = Pair<kKind, true, Vec<T>>(pairs.a, pairs.b, constants).value(constants);
        if (!reduced) {
          store_some(loss + i, value, end - i);
        } else if (end - i >= kLanes<T>) {
          sum.add(value);
        } else {
          Vec<T> rest{};
          std::memcpy(&rest, &value, size_t(end - i) * sizeof(T));
          sum.add(rest);
        }
      }
      if (!reduced) continue;
      store(lanes, sum.total());
      CarefulSum<T> all;
      for (int lane = 0; lane < kLanes<T>; ++lane) all.add(lanes[lane]);
      sums[block] = all.total();
    }
  });
  if (!reduced) return;
  CarefulSum<double> all;
  for (int64_t block = 0; block < blocks; ++block) all.add(double(sums[block]));
  const double total = all.total();
  *loss = T(p.reduction == Reduction::kMean && p.N > 0 ? total / double(p.N) : total);
}

template <typename scalar_t, Kind kKind>
void backward_kind(const LossParams& p) {
  using T = opmath_t<scalar_t>;
  const Constants<Vec<T>> constants = constants_of<T>(p.union_eps, p.enclosing_eps, p.alpha_eps);
  const T* const grad = static_cast<const T*>(p.grad);
  const T scale = p.reduction == Reduction::kMean ? T(p.N) : T(1);
  parallel_for(ceil_div(p.N, kBlock), kPieceBlocks, [&](int64_t first, int64_t last) {
    const int64_t end = min_of(last * kBlock, p.N);
    for (int64_t i = first * kBlock; i < end; i += kLanes<T>) {
      Vec<T> of_loss{};
      if (p.grad_stride == 0) {
        of_loss = splat(*grad / scale);
      } else if (p.grad_stride == 1 && end - i >= kLanes<T>) {
        of_loss = load(grad + i);
      } else {
        for (int lane = 0; lane < kLanes<T> && i + lane < end; ++lane) of_loss[lane] = grad[(i + lane) * p.grad_stride];
      }
      const Lanes<scalar_t, kKind> pairs(p, i, constants);
      BoxGrad<Vec<T>> grad_a, grad_b;
      Pair<kKind, true, Vec<T>>(pairs.a, pairs.b, constants)
          .gradient(pairs.a, pairs.b, constants, -of_loss, grad_a, grad_b);
      const auto write = [&](void* target, const Vec<T>(&c)[4], const BoxGrad<Vec<T>>& box_grad) {
        if (target == nullptr) return;
        Vec<T> out[4];
        finish_gradient<kKind>(Format::kXyxy, c, box_grad, constants, out);
        store_boxes<scalar_t, T>(static_cast<scalar_t*>(target) + 4 * i, end - i, out);
      };
      write(p.grad1, pairs.c1, grad_a);
      write(p.grad2, pairs.c2, grad_b);
    }
  });
}

}  // namespace

void forward(const LossParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    dispatch_loss(p.kind, [&]<Kind kKind>() { forward_kind<decltype(scalar), kKind>(p); });
  });
}

void backward(const LossParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    dispatch_loss(p.kind, [&]<Kind kKind>() { backward_kind<decltype(scalar), kKind>(p); });
  });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, LossParams)
PVK_CPU_ENTRY(void, backward, LossParams)
#if defined(PVK_ISA_BASELINE)
int64_t scratch_bytes(const LossParams&) {
  return 0;
}
#endif

}  // namespace pvk::generalized_box_iou_loss
