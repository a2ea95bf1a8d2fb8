// Moments of parts, merged one after the other (Chan, Golub and LeVeque). Host and device.
#pragma once

#include "core/math.h"

namespace pvk {

// Count, mean and sum of squared differences.
struct MergedMoments {
  double count = 0, mean = 0, square = 0;

  PVK_HOST_DEVICE void add(double n, double other_mean, double other_square) {
    if (n == 0) return;
    const double total = count + n, delta = other_mean - mean;
    square += other_square + (count == 0 ? 0 : delta * delta * (count * (n / total)));
    mean += count == 0 ? other_mean - mean : delta * (n / total);
    count = total;
  }
};

}  // namespace pvk
