// Resizing on CUDA, forward and backward: tables of each axis first, then a thread gathers what it writes, so that
// there are no atomics.
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/interpolate/interpolate.h"

namespace pvk::interpolate {
namespace {

constexpr int kBlockThreads = 256;

// In scratch, for each output its taps; for the gradient also, for each pixel, the outputs that may read it.
template <typename T>
struct Tables {
  T* weights;  // [outputs, most]
  int* starts;
  int* counts;
  int* first;  // [pixels], null in the forward
  int* end;
  int most;

  // Returns the bytes before the next table.
  int64_t place(const ResizeAxis& axis, bool backward, char* scratch, int64_t at) {
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(scratch + at);
      at += ceil_div(count * int64_t(sizeof(*pointer)), int64_t(16)) * 16;
    };
    most = int(axis.most_taps<T>());
    take(weights, axis.outputs * most);
    take(starts, axis.outputs);
    take(counts, axis.outputs);
    first = end = nullptr;
    if (backward) {
      take(first, axis.size);
      take(end, axis.size);
    }
    return at;
  }
};

template <typename T>
struct Plan {
  Tables<T> rows, columns;
  int64_t bytes;

  explicit Plan(const InterpolateParams& p) {
    char* const scratch = static_cast<char*>(p.scratch);
    bytes = columns.place(p.columns, p.backward, scratch, rows.place(p.rows, p.backward, scratch, 0));
  }
};

// A thread owns an output of an axis.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    interpolate_taps_kernel(const __grid_constant__ ResizeAxis axis, const __grid_constant__ Tables<T> tables) {
  const int64_t step = int64_t(gridDim.x) * kBlockThreads;
  for (int64_t o = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; o < axis.outputs; o += step) {
    int64_t start = 0, count = 0;
    axis.taps(o, start, count, tables.weights + o * tables.most);
    tables.starts[o] = int(start);
    tables.counts[o] = int(count);
  }
}

// A thread owns a pixel of an axis. Of outputs in their order neither the first nor the last pixel falls.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    interpolate_outputs_kernel(const __grid_constant__ ResizeAxis axis, const __grid_constant__ Tables<T> tables) {
  const int64_t step = int64_t(gridDim.x) * kBlockThreads;
  for (int64_t x = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; x < axis.size; x += step) {
    const auto search =
        [&](bool by_last) {  // the first output whose last pixel is x or later, whose first one is later
          int64_t low = 0, high = axis.outputs;
          while (low < high) {
            const int64_t o = (low + high) / 2;
            const int64_t k = by_last ? max_of(tables.counts[o] - 1, 0) : 0;
            const int64_t pixel = axis.pixel(tables.starts[o], k);
            if (by_last ? pixel >= x : pixel > x) {
              high = o;
            } else {
              low = o + 1;
            }
          }
          return int(low);
        };
    tables.first[x] = search(true);
    tables.end[x] = search(false);
  }
}

// Calls body(source, weight) for what a target of an axis adds.
template <bool kBackward, typename T, typename Body>
PVK_DEVICE void for_each_source(const ResizeAxis& axis, const Tables<T>& tables, int64_t target, const Body& body) {
  if constexpr (kBackward) {
    const int end = tables.end[target], most = tables.most;
    for (int o = tables.first[target]; o < end; ++o) {
      const T* const weights = tables.weights + int64_t(o) * most;
      const int start = tables.starts[o], count = tables.counts[o];
      T weight = T(0);
      for (int k = 0; k < count; ++k)
        if (axis.pixel(start, k) == target) weight += weights[k];
      body(int64_t(o), weight);
    }
  } else {
    const T* const weights = tables.weights + target * tables.most;
    const int start = tables.starts[target], count = tables.counts[target];
    for (int k = 0; k < count; ++k) body(axis.pixel(start, k), weights[k]);
  }
}

// A thread owns VEC targets that are neighbours in memory: channels of one pixel in channels_last, else pixels of a
// row. Threads go along the memory of the result. Sums of rows, then of these.
template <typename scalar_t, int VEC, bool kChannelsLast, bool kBackward>
__global__ void __launch_bounds__(kBlockThreads)
    interpolate_kernel(const __grid_constant__ InterpolateParams p,
                       const __grid_constant__ Tables<opmath_t<scalar_t>> row_tables,
                       const __grid_constant__ Tables<opmath_t<scalar_t>> column_tables, int64_t count) {
  using T = opmath_t<scalar_t>;
  const int64_t rows = kBackward ? p.rows.size : p.rows.outputs;
  const int64_t columns = kBackward ? p.columns.size : p.columns.outputs;
  const int64_t inner = (kChannelsLast ? p.C : columns) / VEC, middle = kChannelsLast ? columns : rows;
  const int64_t outer = kChannelsLast ? rows : p.C;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t low = i % inner * VEC, mid = i / inner % middle, high = i / inner / middle % outer;
    const int64_t n = i / inner / middle / outer;
    const int64_t c = kChannelsLast ? low : high, row = kChannelsLast ? high : mid, column = kChannelsLast ? mid : low;
    const scalar_t* const from = static_cast<const scalar_t*>(p.from) + n * p.from_stride[0] + c * p.from_stride[1];
    T total[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) total[e] = T(0);
    bool first_row = true;
    for_each_source<kBackward>(p.rows, row_tables, row, [&](int64_t y, T row_weight) {
      const scalar_t* const line = from + y * p.from_stride[2];
      T sum[VEC];
#pragma unroll
      for (int e = 0; e < VEC; ++e) sum[e] = T(0);
      if constexpr (kChannelsLast) {
        for_each_source<kBackward>(p.columns, column_tables, column, [&](int64_t x, T weight) {
          const VecN<scalar_t, VEC> value = load_vec<VEC>(line + x * p.from_stride[3]);
#pragma unroll
          for (int e = 0; e < VEC; ++e) sum[e] += to_opmath(value.data[e]) * weight;
        });
      } else {
#pragma unroll
        for (int e = 0; e < VEC; ++e)
          for_each_source<kBackward>(p.columns, column_tables, column + e, [&](int64_t x, T weight) {
            sum[e] += to_opmath(__ldg(line + x * p.from_stride[3])) * weight;
          });
      }
#pragma unroll
      for (int e = 0; e < VEC; ++e) total[e] = first_row ? sum[e] * row_weight : total[e] + sum[e] * row_weight;
      first_row = false;
    });
    VecN<scalar_t, VEC> result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(total[e]);
    store_vec(static_cast<scalar_t*>(p.to) + n * p.to_stride[0] + c * p.to_stride[1] + row * p.to_stride[2] +
                  column * p.to_stride[3],
              result);
  }
}

LaunchConfig config_of(int64_t count, Stream stream) {
  const int64_t blocks = min_of(ceil_div(count, int64_t(kBlockThreads)), int64_t(1) << 22);
  return {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream};
}

// Whether a thread can write 16 bytes, and in channels_last read them. The gradient of planes, whose pixels each gather
// from outputs of their own, is written one by one: more would not fit the registers.
template <typename scalar_t>
bool allows_vectors(const InterpolateParams& p) {
  constexpr int64_t kVec = kVec16<scalar_t>;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (!aligned(p.to)) return false;
  if (!p.channels_last) return !p.backward && p.columns.outputs % kVec == 0;
  if (p.C % kVec != 0 || !aligned(p.from)) return false;
  for (int i = 0; i < 4; ++i)
    if (i != 1 && p.from_stride[i] % kVec != 0) return false;
  return true;
}

template <typename scalar_t, int VEC, bool kBackward>
void gather(const InterpolateParams& p, const Plan<opmath_t<scalar_t>>& plan, Stream stream) {
  const int64_t rows = kBackward ? p.rows.size : p.rows.outputs;
  const int64_t count = p.N * p.C * rows * (kBackward ? p.columns.size : p.columns.outputs) / VEC;
  const LaunchConfig config = config_of(count, stream);
  if (p.channels_last) {
    launch(interpolate_kernel<scalar_t, VEC, true, kBackward>, config, p, plan.rows, plan.columns, count);
  } else if constexpr (!kBackward || VEC == 1) {
    launch(interpolate_kernel<scalar_t, VEC, false, kBackward>, config, p, plan.rows, plan.columns, count);
  }
}

template <typename T>
void fill_tables(const ResizeAxis& axis, const Tables<T>& tables, bool backward, Stream stream) {
  launch(interpolate_taps_kernel<T>, config_of(axis.outputs, stream), axis, tables);
  if (backward) launch(interpolate_outputs_kernel<T>, config_of(axis.size, stream), axis, tables);
}

}  // namespace

int64_t scratch_bytes(const InterpolateParams& p) {
  return p.dtype == DType::kFloat64 ? Plan<double>(p).bytes : Plan<float>(p).bytes;
}

void resize(const InterpolateParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    const Plan<opmath_t<scalar_t>> plan(p);
    fill_tables(p.rows, plan.rows, p.backward, stream);
    fill_tables(p.columns, plan.columns, p.backward, stream);
    const bool vectors = allows_vectors<scalar_t>(p);
    if (p.backward) {
      vectors ? gather<scalar_t, kVec, true>(p, plan, stream) : gather<scalar_t, 1, true>(p, plan, stream);
    } else {
      vectors ? gather<scalar_t, kVec, false>(p, plan, stream) : gather<scalar_t, 1, false>(p, plan, stream);
    }
  });
}

}  // namespace pvk::interpolate
