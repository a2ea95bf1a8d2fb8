// Average pooling of planes with wide or uneven windows on the CPU, adaptive ones and the whole map among them.
//
// A task is output rows. A window's rows are summed down first, in registers; then each window along the row, to one
// register, and kLanes of these together to as many results. Long sums run in blocks, which are then added.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/pool_lanes.h"
#include "ops/avg_pool2d/cpu_kernels.h"

namespace pvk::avg_pool2d::PVK_ISA {
namespace {

constexpr int64_t kBlock = 32;  // registers
constexpr int64_t kRows = 4;    // of sums, before their windows are read: stores have then left for the cache

// Lane i: the sum of the lanes of register i.
template <int kRegisters, typename T>
PVK_INLINE Vec<T> sum_each(const T* registers) {
  if constexpr (kRegisters == 1) {
    return load(registers);
  } else {
    constexpr int kHalf = kRegisters / 2;
    const Vec<T> first = sum_each<kHalf>(registers), second = sum_each<kHalf>(registers + kHalf * kLanes<T>);
    return even_lanes<T>(first, second) + odd_lanes<T>(first, second);
  }
}

// Windows' sums, each in a register, that become results which follow each other.
template <typename scalar_t>
struct Results {
  using T = opmath_t<scalar_t>;
  static constexpr int kLane = kLanes<T>;
  scalar_t* target;
  int count = 0;
  alignas(64) T sums[kLane * kLane] = {};
  alignas(64) T divisors[kLane];

  explicit Results(scalar_t* first) : target(first) { fill(divisors, kLane, T(1)); }

  PVK_INLINE void add(Vec<T> sum, T divisor) {
    store(sums + count * kLane, sum);
    divisors[count] = divisor;
    if (++count == kLane) write();
  }
  PVK_INLINE void write() {
    store_some(target, sum_each<kLane>(sums) / load(divisors), count);
    target += count;
    count = 0;
  }
};

// Sums of columns: kPairs pairs of registers, `in_last` elements of the last.
template <int kPairs, typename scalar_t, typename T>
void sum_down(const scalar_t* from, int64_t stride, int64_t rows, int64_t in_last, T* sums) {
  Pair<T> total[kPairs];
  for (int64_t y = 0; y < rows;) {
    Pair<T> block[kPairs];
    for (const int64_t stop = min_of(y + kBlock, rows); y < stop; ++y, from += stride) {
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i)
        block[i] = block[i] + load_elements(from + i * kPair<scalar_t>, i + 1 == kPairs ? in_last : kPair<scalar_t>);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kPairs; ++i) total[i] = total[i] + block[i];
  }
#pragma GCC unroll 2
  for (int i = 0; i < kPairs; ++i) store_in_order<scalar_t, T>(sums + i * kPair<scalar_t>, total[i]);
}

// The sum of values[0, ..., count), as a register. Whole registers may be read.
template <typename T>
PVK_INLINE Vec<T> sum_along(const T* values, int64_t count) {
  constexpr int64_t kLane = kLanes<T>;
  if (count <= kLane) return keep_first<T>(load(values), count);
  Vec<T> sum{};
  int64_t i = 0;
  while (i + kLane <= count) {
    Vec<T> block{};
    for (const int64_t stop = min_of(i + kBlock * kLane, count); i + kLane <= stop; i += kLane)
      block += load(values + i);
    sum += block;
  }
  return sum + keep_first<T>(load(values + i), count - i);
}

// The same straight from a row of the map.
template <typename scalar_t, typename T = opmath_t<scalar_t>>
PVK_INLINE Vec<T> sum_row(const scalar_t* row, int64_t count) {
  constexpr int64_t kWhole = kPair<scalar_t>;
  Pair<T> sum;
  int64_t i = 0;
  while (i + kWhole <= count) {
    Pair<T> even, odd;
    const int64_t stop = min_of(i + 2 * kBlock * kWhole, count);
    for (; i + 2 * kWhole <= stop; i += 2 * kWhole) {
      even = even + load_elements(row + i, kWhole);
      odd = odd + load_elements(row + i + kWhole, kWhole);
    }
    if (i + kWhole <= stop) {
      even = even + load_elements(row + i, kWhole);
      i += kWhole;
    }
    sum = sum + (even + odd);
  }
  if (i < count) sum = sum + load_elements(row + i, count - i);
  return sum.first + sum.second;
}

template <typename scalar_t>
void pool_windows(const AvgPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kWhole = kPair<scalar_t>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs, W = p.columns.size;
  const int64_t padded = ceil_div(W, kWhole) * kWhole;
  Buffer<PoolRange> windows(OW), row_windows(OH);
  Buffer<T> divisors(OW), row_divisors(OH);
  column_divisors(p, 1, OW, divisors.data());
  for (int64_t o = 0; o < OW; ++o) windows[o] = p.columns.window(o);
  for (int64_t o = 0; o < OH; ++o) {
    row_windows[o] = p.rows.window(o);
    row_divisors[o] = T(p.divisor_of(p.rows, true, o));
  }
  const int64_t stride = p.map_stride[2], a_row = max_of<int64_t>(1, W * max_of<int64_t>(1, p.rows.size / OH));
  parallel_for(p.N * p.C * OH, max_of<int64_t>(1, kPiece / a_row), [&](int64_t begin, int64_t end) {
    const int64_t pitch = OW == 1 ? 0 : padded + kLanes<T>;  // windows are read in whole registers
    Buffer<T> sums(kRows * pitch);
    fill(sums.data(), kRows * pitch, T(0));
    Results<scalar_t> results(static_cast<scalar_t*>(p.pooled) + begin * OW);
    for (int64_t task = begin; task < end;) {
      const int64_t plane = task / OH, first = task % OH, last = min_of(min_of(first + kRows, OH), first + end - task);
      const scalar_t* const map =
          static_cast<const scalar_t*>(p.map) + plane / p.C * p.map_stride[0] + plane % p.C * p.map_stride[1];
      task += last - first;
      for (int64_t oh = first; oh < last; ++oh) {
        const int64_t count = row_windows[oh].end - row_windows[oh].begin;
        const scalar_t* const from = map + row_windows[oh].begin * stride;
        if (OW == 1) {
          Vec<T> sum{};
          const int64_t x = windows[0].begin, width = windows[0].end - x;
          for (int64_t y = 0; y < count; ++y) sum += sum_row(from + y * stride + x, width);
          results.add(sum, divisors[0] * row_divisors[oh]);
          continue;
        }
        T* const to = sums.data() + (oh - first) * pitch;
        for (int64_t i = 0; i < W; i += 2 * kWhole) {
          const bool both = W - i > kWhole;
          const auto sum = both ? sum_down<2, scalar_t, T> : sum_down<1, scalar_t, T>;
          sum(from + i, stride, count, min_of(both ? W - i - kWhole : W - i, kWhole), to + i);
        }
      }
      if (OW == 1) continue;
      for (int64_t oh = first; oh < last; ++oh) {
        const T* const row = sums.data() + (oh - first) * pitch;
        for (int64_t o = 0; o < OW; ++o)
          results.add(sum_along(row + windows[o].begin, windows[o].end - windows[o].begin),
                      divisors[o] * row_divisors[oh]);
      }
    }
    if (results.count > 0) results.write();
  });
}

}  // namespace

void forward_windows(const AvgPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { pool_windows<decltype(scalar)>(p); });
}

}  // namespace pvk::avg_pool2d::PVK_ISA
