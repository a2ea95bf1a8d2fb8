// Windows of pooling along one axis, on host and device: which pixels an output reads, which outputs read a pixel.
#pragma once

#include "core/math.h"

namespace pvk {

struct PoolRange {
  int64_t begin, end;  // empty where end <= begin
};

// Output o of a plain axis reads pixels o * stride - padding + k * dilation, k below kernel; of an adaptive one
// (kernel 0) those from floor(o * size / outputs) up to ceil((o + 1) * size / outputs). All of them lie inside the map.
struct PoolAxis {
  int64_t size, outputs;
  int64_t kernel, stride, padding, dilation;

  // From the first pixel to beyond the last; they are `dilation` apart.
  PVK_HOST_DEVICE PoolRange window(int64_t o) const {
    if (kernel == 0) return {o * size / outputs, ((o + 1) * size + outputs - 1) / outputs};
    const int64_t start = o * stride - padding;
    const int64_t outside = start < 0 ? ceil_div(-start, dilation) * dilation : 0;
    return {start + outside, min_of(start + (kernel - 1) * dilation + 1, size)};
  }

  // The outputs whose windows span pixel x; both ends grow with x.
  PVK_HOST_DEVICE PoolRange outputs_of(int64_t x) const {
    if (kernel == 0) return {x * outputs / size, ((x + 1) * outputs + size - 1) / size};
    const int64_t reach = (kernel - 1) * dilation + 1, place = x + padding;
    return {place < reach ? 0 : (place - reach) / stride + 1, min_of(place / stride + 1, outputs)};
  }

  // Pixels of a window, those in the padding with it: what an average divides by.
  PVK_HOST_DEVICE int64_t padded_count(int64_t o) const {
    if (kernel == 0) return window(o).end - window(o).begin;
    const int64_t start = o * stride - padding;
    return min_of(start + kernel, size + padding) - start;
  }
};

}  // namespace pvk
