// Non-maximum suppression: parameters and backend interface.
//
// B images of N boxes, each image in descending order of score; box j is dropped when an earlier kept box i of its
// group has IoU(i, j) > iou_threshold. The IoU is torchvision's CPU arithmetic, rounding for rounding: areas,
// intersection and quotient in T (float for half types), no contraction into fused multiply-adds, the comparison in
// double. Soft NMS lowers the scores of such boxes instead.
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::nms {

struct NmsParams {
  const void* boxes;     // [B, N, 4]: (x1, y1, x2, y2), through any strides
  const void* scores;    // [B, N], through any strides
  const void* groups;    // [B, N] integers, through any strides, of which only equality matters; nullptr: one group
  const int64_t* order;  // [B, N]: box indices by descending score, ties by index; nullptr where sorts_scores()
  int64_t* keep;         // [B, max_output]: written with the indices kept, in that order, then -1
  int64_t* count;        // [B]: written with how many were kept
  void* scratch;         // scratch_bytes(B, N) bytes on the device
  DType dtype;           // of boxes and scores
  int group_bytes;       // of an element of groups: 1, 2, 4 or 8
  bool padded;           // -1 behind the indices kept; a box with score -inf is not there
  int64_t B, N, max_output;
  int64_t boxes_stride[3], scores_stride[2], groups_stride[2], order_stride[2];
  double iou_threshold;
};

struct SoftNmsParams {
  const void* boxes;   // [N, 4], through any strides
  const void* scores;  // [N], through any stride
  const void* groups;  // [N] integers, through any stride; nullptr: one group
  const int64_t*
      order;           // [N]: indices, equal groups together, ties by index; nullptr where sorts_scores() or one group
  void* decayed;       // [N] of T: the score with which a box was selected, or -inf
  const void* sorted;  // [N] of T: `decayed` in descending order, ties by index; nullptr where sorts_scores()
  int64_t* keep;       // [N]: the indices in that order
  void* kept_scores;   // [N] of dtype: `sorted`, rounded
  int64_t* count;      // [1]: how many boxes were selected
  void* scratch;       // soft_scratch_bytes(N, dtype) bytes on the device
  DType dtype;
  int group_bytes;
  bool gaussian;  // or linear
  int64_t N;
  int64_t boxes_stride[2], scores_stride, groups_stride;
  double iou_threshold, sigma, score_threshold;
};

// ---- backend interface ----

bool sorts_scores();  // whether the kernels sort; otherwise the binding does, on the device

// Needs B, N and max_output above 0.
int64_t scratch_bytes(int64_t B, int64_t N);
void forward(const NmsParams& params, Stream stream);

// Soft NMS in two steps, with a sort of `decayed` between them where the kernels do not sort. Needs N above 0.
int64_t soft_scratch_bytes(int64_t N, DType dtype);
void soft_decay(const SoftNmsParams& params, Stream stream);
void soft_finish(const SoftNmsParams& params, Stream stream);

// On a GPU the one synchronisation.
int64_t read_count(const int64_t* count, Stream stream);

// ---- arithmetic that the backends share: the same bits on each ----

// Of exp_of_negative, here and in the CPU's vectors of it. ln 2 is in two parts, the first with few enough bits that k
// times it is exact.
inline constexpr double kLog2E = 0x1.71547652b82fep0, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
inline constexpr double kLowestExponent = -745.2;  // exp() of what is less is 0

// The Taylor series of exp by Horner's rule: step(sum, c) is sum * r + c.
template <typename V, typename Step>
PVK_HOST_DEVICE V exp_series(V sum, const Step& step) {
  constexpr double kInverse[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0,
  };
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 13; i >= 0; --i) sum = step(sum, kInverse[i]);
  return sum;
}

PVK_HOST_DEVICE double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(1023 + exponent) << 52;
  double value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// exp(x) for x <= 0, to about one unit: x = k ln 2 + r, and the Taylor series of exp(r). Multiplications and additions
// alone, each rounded once.
PVK_HOST_DEVICE double exp_of_negative(double x) {
  if (!(x > kLowestExponent)) return 0;
  const int k = int(add_rn(mul_rn(x, kLog2E), -0.5));
  const double r = sub_rn(sub_rn(x, mul_rn(k, kLn2High)), mul_rn(k, kLn2Low));
  const double sum = exp_series(0.0, [&](double sum, double c) { return add_rn(mul_rn(sum, r), c); });
  // In two factors, since k may be below -1022.
  return mul_rn(mul_rn(sum, power_of_two(k / 2)), power_of_two(k - k / 2));
}

// What a selected box leaves of the score of a box that it overlaps by `iou` (0 <= iou <= 1; NaN leaves all).
template <typename T>
PVK_HOST_DEVICE T decay(T score, T iou, const SoftNmsParams& p) {
  if (!(iou > T(0))) return score;
  if (p.gaussian) return mul_rn(score, T(exp_of_negative(-div_rn(mul_rn(double(iou), double(iou)), p.sigma))));
  return double(iou) > p.iou_threshold ? mul_rn(score, sub_rn(T(1), iou)) : score;
}

}  // namespace pvk::nms
