// The overlap of two boxes and its derivative: one formula for the pairwise ops and the losses, for CPU and CUDA.
//
// V is a vector of float or double on the CPU, Rounded<float> or Rounded<double> on CUDA: whatever has + - * / with one
// rounding each, comparisons, and a ternary on their result. A maximum of equal coordinates hands each half of its
// gradient, as PyTorch's does.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace pvk::box_iou {

enum class Kind : int64_t { kPlain, kGeneralized, kDistance, kComplete };
enum class Format : int64_t { kXyxy, kXywh, kCxcywh };

// How many of Box's and of BoxGrad's fields a kind uses; the others stay unset.
PVK_HOST_DEVICE constexpr int fields_of(Kind kind) {
  return kind == Kind::kComplete ? 8 : kind == Kind::kDistance ? 7 : 5;
}
PVK_HOST_DEVICE constexpr int grad_fields_of(Kind kind) {
  return kind == Kind::kComplete ? 6 : 5;
}

// body.operator()<kKind>(), of a loss and of any kind.
template <typename Body>
inline __attribute__((always_inline)) void dispatch_loss(Kind kind, const Body& body) {
  if (kind == Kind::kGeneralized) return body.template operator()<Kind::kGeneralized>();
  if (kind == Kind::kDistance) return body.template operator()<Kind::kDistance>();
  body.template operator()<Kind::kComplete>();
}

template <typename Body>
inline __attribute__((always_inline)) void dispatch_kind(Kind kind, const Body& body) {
  if (kind == Kind::kPlain) return body.template operator()<Kind::kPlain>();
  dispatch_loss(kind, body);
}

constexpr int kMaxGradFields = 6;

// Arithmetic of one rounding per operation on CUDA, where the compiler would fuse multiplications with additions.
template <typename T>
struct Rounded {
  T value;
  friend PVK_HOST_DEVICE Rounded operator+(Rounded a, Rounded b) { return {add_rn(a.value, b.value)}; }
  friend PVK_HOST_DEVICE Rounded operator-(Rounded a, Rounded b) { return {sub_rn(a.value, b.value)}; }
  friend PVK_HOST_DEVICE Rounded operator*(Rounded a, Rounded b) { return {mul_rn(a.value, b.value)}; }
  friend PVK_HOST_DEVICE Rounded operator/(Rounded a, Rounded b) { return {div_rn(a.value, b.value)}; }
  friend PVK_HOST_DEVICE Rounded operator-(Rounded a) { return {-a.value}; }
  friend PVK_HOST_DEVICE bool operator<(Rounded a, Rounded b) { return a.value < b.value; }
  friend PVK_HOST_DEVICE bool operator>(Rounded a, Rounded b) { return a.value > b.value; }
  friend PVK_HOST_DEVICE bool operator==(Rounded a, Rounded b) { return a.value == b.value; }
};

template <typename V>
struct Box {
  V x1, y1, x2, y2, area;
  V cx, cy;  // the centre: kDistance and kComplete
  V angle;   // atan(width / height): kComplete
};

// Of one box; `angle` only for kComplete. The centre's gradient is part of the corners'.
template <typename V>
struct BoxGrad {
  V x1, y1, x2, y2, area, angle;
};

// body(index, field) for the fields that the kind uses.
template <Kind kKind, typename V, typename Body>
PVK_HOST_DEVICE void each_field(BoxGrad<V>& grad, const Body& body) {
  body(0, grad.x1);
  body(1, grad.y1);
  body(2, grad.x2);
  body(3, grad.y2);
  body(4, grad.area);
  if constexpr (kKind == Kind::kComplete) body(5, grad.angle);
}

template <typename V>
struct Constants {
  V half, one, two;
  V four_over_pi2;
  V union_eps;      // losses only
  V enclosing_eps;  // of the enclosing area (losses only) or squared diagonal
  V alpha_eps;

  template <typename Splat>
  static PVK_HOST_DEVICE Constants make(double union_eps, double enclosing_eps, double alpha_eps, const Splat& splat) {
    return {splat(0.5),       splat(1.0),           splat(2.0),      splat(0.40528473456935109),
            splat(union_eps), splat(enclosing_eps), splat(alpha_eps)};
  }
};

template <typename V>
struct Sides {
  V width, height;
};

template <typename V>
PVK_HOST_DEVICE Sides<V> sides_of(Format format, const V (&c)[4]) {
  if (format == Format::kXyxy) return {c[2] - c[0], c[3] - c[1]};
  return {c[2], c[3]};
}

// All but the angle. The area is the product of the sides as given; NaN where a coordinate is, so that every overlap
// with the box is NaN.
template <Kind kKind, typename V>
PVK_HOST_DEVICE Box<V> make_box(Format format, const V (&c)[4], const Constants<V>& constants) {
  Box<V> box;
  const Sides<V> sides = sides_of(format, c);
  box.area = sides.width * sides.height;
  if (format == Format::kXyxy) {
    box.x1 = c[0], box.y1 = c[1], box.x2 = c[2], box.y2 = c[3];
  } else if (format == Format::kXywh) {
    box.x1 = c[0], box.y1 = c[1], box.x2 = c[0] + c[2], box.y2 = c[1] + c[3];
  } else {
    const V across = c[2] * constants.half, down = c[3] * constants.half;
    box.x1 = c[0] - across, box.y1 = c[1] - down, box.x2 = c[0] + across, box.y2 = c[1] + down;
  }
  if (format != Format::kXyxy) {
    const V place = c[0] + c[1];
    const V nothing = place - place;  // NaN for an infinite place too
    box.area = (c[0] == c[0]) & (c[1] == c[1]) ? box.area : nothing;
  }
  if constexpr (kKind >= Kind::kDistance) {
    box.cx = (box.x1 + box.x2) * constants.half;
    box.cy = (box.y1 + box.y2) * constants.half;
  }
  return box;
}

// The gradient of the four numbers that a box was given as, from that of its corners, area and angle.
template <Kind kKind, typename V>
PVK_HOST_DEVICE void finish_gradient(Format format, const V (&c)[4], const BoxGrad<V>& grad,
                                     const Constants<V>& constants, V (&out)[4]) {
  const Sides<V> sides = sides_of(format, c);
  V width = grad.area * sides.height, height = grad.area * sides.width;
  if constexpr (kKind == Kind::kComplete) {
    const V ratio = sides.width / sides.height;
    const V grad_ratio = grad.angle / (ratio * ratio + constants.one);
    width = width + grad_ratio / sides.height;
    height = height - grad_ratio * (ratio / sides.height);
  }
  if (format == Format::kXyxy) {
    out[0] = grad.x1 - width, out[1] = grad.y1 - height, out[2] = grad.x2 + width, out[3] = grad.y2 + height;
    return;
  }
  out[0] = grad.x1 + grad.x2, out[1] = grad.y1 + grad.y2;
  if (format == Format::kXywh) {
    out[2] = grad.x2 + width, out[3] = grad.y2 + height;
  } else {
    out[2] = (grad.x2 - grad.x1) * constants.half + width;
    out[3] = (grad.y2 - grad.y1) * constants.half + height;
  }
}

// A sum that carries what rounding takes from it.
template <typename V>
struct CarefulSum {
  V sum{}, rest{};
  PVK_HOST_DEVICE void add(V value) {
    const V next = sum + value, added = next - sum;
    rest = rest + ((sum - (next - added)) + (value - added));
    sum = next;
  }
  // `rest` is NaN where the sum is not finite.
  PVK_HOST_DEVICE V total() const { return rest == rest ? sum + rest : sum; }
};

// Of two boxes. The pairwise ops clamp sides at 0; the losses set the intersection to 0 where a side is not positive,
// leave the enclosing box as it is, and add an epsilon to each denominator.
template <Kind kKind, bool kLoss, typename V>
struct Pair {
  V width, height;  // of the intersection, not clamped
  V inter_width, inter_height, inter;
  V joined, divisor, iou;
  V enclosing_width, enclosing_height;  // not clamped
  V clamped_width, clamped_height;      // of the enclosing box
  V enclosing, penalty;                 // area or squared diagonal, with its epsilon; what is subtracted
  V area;                               // of the enclosing box: kGeneralized
  V dx, dy, squared_distance;           // of the centres
  V turn, alpha, v;                     // difference of the angles

  PVK_HOST_DEVICE Pair(const Box<V>& a, const Box<V>& b, const Constants<V>& c) {
    const V zero{};
    width = min_of(a.x2, b.x2) - max_of(a.x1, b.x1);
    height = min_of(a.y2, b.y2) - max_of(a.y1, b.y1);
    if constexpr (kLoss) {
      inter_width = width, inter_height = height;
      inter = (width > zero) & (height > zero) ? width * height : zero;
    } else {
      inter_width = max_of(width, zero), inter_height = max_of(height, zero);  // NaN stays
      inter = inter_width * inter_height;
    }
    joined = a.area + b.area - inter;
    divisor = joined;
    if constexpr (kLoss) divisor = joined + c.union_eps;
    iou = inter / divisor;
    if constexpr (kKind != Kind::kPlain) measure_enclosing(a, b, c);
    if constexpr (kKind == Kind::kComplete) {
      turn = a.angle - b.angle;
      v = c.four_over_pi2 * (turn * turn);
      alpha = v / (c.one - iou + v + c.alpha_eps);
    }
  }

  // The similarity, or the loss: one minus it.
  PVK_HOST_DEVICE V value(const Constants<V>& c) const {
    if constexpr (kKind == Kind::kPlain) {
      return iou;
    } else if constexpr (!kLoss) {
      if constexpr (kKind == Kind::kComplete) return iou - penalty - alpha * v;
      return iou - penalty;
    } else {
      if constexpr (kKind == Kind::kGeneralized) return c.one - (iou - penalty);
      if constexpr (kKind == Kind::kComplete) return c.one - iou + penalty + alpha * v;
      return c.one - iou + penalty;
    }
  }

  // Gradients of both boxes, from that of the similarity (of a loss: its negative). The order of the operations is
  // autograd's, so that what is not finite spreads as it does there.
  PVK_HOST_DEVICE void gradient(const Box<V>& a, const Box<V>& b, const Constants<V>& c, V grad, BoxGrad<V>& grad_a,
                                BoxGrad<V>& grad_b) const {
    const V zero{};
    V grad_joined = -(grad * (iou / divisor));
    V grad_w = zero, grad_h = zero, grad_cx = zero, grad_cy = zero;  // of the enclosing box; of the centres
    if constexpr (kKind == Kind::kGeneralized) {
      const V grad_difference = grad / enclosing;
      const V grad_area = grad * (penalty / enclosing) - grad_difference;
      grad_joined = grad_joined + grad_difference;
      grad_w = grad_area * clamped_height, grad_h = grad_area * clamped_width;
    } else if constexpr (kKind >= Kind::kDistance) {
      const V grad_distance = grad / enclosing;
      const V twice = grad * (penalty / enclosing) * c.two;
      grad_w = twice * clamped_width, grad_h = twice * clamped_height;
      grad_cx = grad_distance * dx, grad_cy = grad_distance * dy;
    }
    const V grad_inter = grad / divisor - grad_joined;
    V grad_iw = grad_inter * inter_height, grad_ih = grad_inter * inter_width;
    if constexpr (kLoss) {
      const auto meets = (width > zero) & (height > zero);
      grad_iw = meets ? grad_iw : zero;
      grad_ih = meets ? grad_ih : zero;
    } else {
      grad_iw = width > zero ? grad_iw : zero;
      grad_ih = height > zero ? grad_ih : zero;
      grad_w = enclosing_width > zero ? grad_w : zero;
      grad_h = enclosing_height > zero ? grad_h : zero;
    }
    share(a.x1 > b.x1, a.x1 < b.x1, grad_iw, grad_w, c, grad_a.x1, grad_b.x1);
    share(a.y1 > b.y1, a.y1 < b.y1, grad_ih, grad_h, c, grad_a.y1, grad_b.y1);
    share(a.x2<b.x2, a.x2> b.x2, grad_iw, grad_w, c, grad_a.x2, grad_b.x2);
    share(a.y2<b.y2, a.y2> b.y2, grad_ih, grad_h, c, grad_a.y2, grad_b.y2);
    settle(grad_a, -grad_cx, -grad_cy);
    settle(grad_b, grad_cx, grad_cy);
    grad_a.area = grad_b.area = grad_joined;
    if constexpr (kKind == Kind::kComplete) {
      grad_b.angle = grad * alpha * c.four_over_pi2 * (c.two * turn);
      grad_a.angle = -grad_b.angle;
    }
  }

 private:
  PVK_HOST_DEVICE void measure_enclosing(const Box<V>& a, const Box<V>& b, const Constants<V>& c) {
    const V zero{};
    enclosing_width = max_of(a.x2, b.x2) - min_of(a.x1, b.x1);
    enclosing_height = max_of(a.y2, b.y2) - min_of(a.y1, b.y1);
    clamped_width = enclosing_width, clamped_height = enclosing_height;
    if constexpr (!kLoss) {
      clamped_width = max_of(enclosing_width, zero);
      clamped_height = max_of(enclosing_height, zero);
    }
    if constexpr (kKind == Kind::kGeneralized) {
      area = clamped_width * clamped_height;
      enclosing = area;
      if constexpr (kLoss) enclosing = area + c.enclosing_eps;
      penalty = (area - joined) / enclosing;
    } else {
      enclosing = clamped_width * clamped_width + clamped_height * clamped_height + c.enclosing_eps;
      dx = a.cx - b.cx, dy = a.cy - b.cy;
      squared_distance = dx * dx + dy * dy;
      penalty = squared_distance / enclosing;
    }
  }

  // One coordinate of the two boxes: the box that bounds the intersection takes its gradient, the other that of the
  // enclosing box, and equals take half of both.
  template <typename Mask>
  static PVK_HOST_DEVICE void share(Mask a_inside, Mask b_inside, V inside, V outside, const Constants<V>& c, V& to_a,
                                    V& to_b) {
    const V half = (inside + outside) * c.half;
    to_a = a_inside ? inside : b_inside ? outside : half;
    to_b = b_inside ? inside : a_inside ? outside : half;
  }

  // `share` gave sizes of sides; a low corner's gradient is the negative. Adds the centre's halves.
  static PVK_HOST_DEVICE void settle(BoxGrad<V>& grad, V cx, V cy) {
    if constexpr (kKind >= Kind::kDistance) {
      grad.x1 = cx - grad.x1, grad.y1 = cy - grad.y1, grad.x2 = cx + grad.x2, grad.y2 = cy + grad.y2;
    } else {
      grad.x1 = -grad.x1, grad.y1 = -grad.y1;
    }
  }
};

}  // namespace pvk::box_iou
