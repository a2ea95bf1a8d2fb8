// The gradient of average pooling on the CPU for channels_last maps with few channels.
//
// A task is some images. The gradients of the outputs above and below a row, divided as their windows were, are added;
// then each pixel of the row adds those of the outputs beside it: for each residue modulo the stride, registers of
// neighbouring outputs. Rows under the same outputs are equal.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "ops/avg_pool2d/cpu_kernels.h"

namespace pvk::avg_pool2d::PVK_ISA {
namespace {

// Pixel x of residue (x + padding) % stride takes from outputs (x + padding) / stride - j, j = 0, 1, ...
template <typename T>
struct Spread {
  int64_t zeros;  // elements before the first output
  int64_t pitch;  // of a residue, in whole registers
  int64_t size;   // of the row of outputs with zeros around it

  Spread(const AvgPool2dParams& p, const RowPlan& plan) {
    const PoolAxis& a = p.columns;
    constexpr int64_t kLane = kLanes<T>;
    zeros = plan.phased ? ceil_div(a.kernel, a.stride) * plan.group : 0;
    pitch = plan.phased ? ceil_div(((a.size - 1 + a.padding) / a.stride + 1) * plan.group, kLane) * kLane : 0;
    size = zeros + max_of(pitch, plan.pitch);
  }
};

template <typename scalar_t, typename T>
PVK_INLINE void write_row(const T* values, int64_t count, scalar_t* target) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store_some(target + i, load_some(values + i, count - i), count - i);
}

// The residues' pixels back in their order.
template <typename scalar_t, typename T>
PVK_INLINE void copy_from_phases(const PoolAxis& a, int64_t G, const T* phases, int64_t pitch, scalar_t* row) {
  const int64_t stride = a.stride, padding = a.padding, W = a.size;
  if (stride == 1) return write_row<scalar_t, T>(phases + padding * G, W * G, row);
  for (int64_t residue = 0; residue < min_of(stride, W); ++residue) {
    const int64_t place = padding + residue;
    const T* from = phases + place % stride * pitch + place / stride * G;
    for (int64_t x = residue; x < W; x += stride, from += G)
      for (int64_t c = 0; c < G; ++c) row[x * G + c] = from_float<scalar_t>(from[c]);
  }
}

template <typename scalar_t>
void spread(const AvgPool2dParams& given) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const AvgPool2dParams p = with_joined_rows(given);
  const RowPlan plan = plan_row<T>(p.rows, p.columns, p.channels_last ? p.C : 1);
  const Spread<T> layout(p, plan);
  const int64_t G = plan.group, planes = p.N * (G == 1 ? p.C : 1), H = p.rows.size, row = plan.columns;
  const int64_t OW = p.columns.outputs, stride = p.columns.stride;
  Buffer<T> divisors(plan.pitch), row_divisors(p.rows.outputs);
  Buffer<PoolRange> windows(OW);
  for (int64_t o = 0; o < p.rows.outputs; ++o) row_divisors[o] = T(p.divisor_of(p.rows, true, o));
  for (int64_t o = 0; o < OW; ++o) windows[o] = p.columns.window(o);
  if (OW > 0) column_divisors(p, G, plan.pitch, divisors.data());
  parallel_for(planes, max_of<int64_t>(1, kPiece / (H * row)), [&](int64_t begin, int64_t end) {
    Buffer<T> outputs(layout.size), phases(plan.phased ? layout.pitch * stride : ceil_div(row, kLane) * kLane);
    fill(outputs.data(), layout.size, T(0));
    T* const sums = outputs.data() + layout.zeros;
    for (int64_t plane = begin; plane < end; ++plane) {
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + plane * p.rows.outputs * plan.outputs;
      scalar_t* const target = static_cast<scalar_t*>(p.map) + plane * H * row;
      PoolRange above{-1, -1};
      for (int64_t y = 0; y < H; ++y) {
        const PoolRange range = p.rows.outputs_of(y);
        if (range.begin == above.begin && range.end == above.end) {
          __builtin_memcpy(target + y * row, target + (y - 1) * row, size_t(row) * sizeof(scalar_t));
          continue;
        }
        above = range;
        for (int64_t i = 0; i < plan.outputs; i += kLane) {
          Vec<T> sum{};
          for (int64_t oh = range.begin; oh < range.end; ++oh)
            sum += load_some(grad + oh * plan.outputs + i, plan.outputs - i) / (load(&divisors[i]) * row_divisors[oh]);
          store_some(sums + i, sum, plan.outputs - i);
        }
        if (!plan.phased) {
          fill(phases.data(), row, T(0));
          for (int64_t o = 0; o < OW; ++o)
            for (int64_t c = 0; c < G; ++c) {
              const T value = sums[o * G + c];
              for (int64_t x = windows[o].begin; x < windows[o].end; ++x) phases[x * G + c] += value;
            }
          write_row<scalar_t, T>(phases.data(), row, target + y * row);
          continue;
        }
        for (int64_t residue = 0; residue < stride; ++residue) {
          const int64_t count = residue < plan.taps ? (plan.taps - 1 - residue) / stride + 1 : 0;
          T* const to = phases.data() + residue * layout.pitch;
          for (int64_t i = 0; i < layout.pitch; i += kLane) {
            Vec<T> sum{};
            for (int64_t j = 0; j < count; ++j) sum += load(sums + i - j * G);
            store(to + i, sum);
          }
        }
        copy_from_phases<scalar_t, T>(p.columns, G, phases.data(), layout.pitch, target + y * row);
      }
    }
  });
}

}  // namespace

void backward_rows(const AvgPool2dParams& p) {
  if (!p.channels_last || p.C == 1) return backward_planes(p);
  dispatch_floating(p.dtype, [&](auto scalar) { spread<decltype(scalar)>(p); });
}

}  // namespace pvk::avg_pool2d::PVK_ISA
