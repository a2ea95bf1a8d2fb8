// The CPU's kernels of maps.h. A piece of work is some pixels with all their channels; poolings are those of the ops.
#include <cstring>

#include "core/dispatch.h"
#include "core/epilogue.h"
#include "core/isa.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/simd_partial.h"
#include "graph/maps.h"
#include "ops/avg_pool2d/avg_pool2d.h"
#include "ops/max_pool2d/max_pool2d.h"

namespace pvk::graph {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int64_t kPiece = 16384;  // elements that a thread gets at least

template <typename scalar_t>
struct Memory {
  const scalar_t* input;
  const scalar_t* other;
  scalar_t* output;
  explicit Memory(const MapParams& p)
      : input(static_cast<const scalar_t*>(p.input)),
        other(static_cast<const scalar_t*>(p.other)),
        output(static_cast<scalar_t*>(p.output)) {}
};

// body(first channel, how many of a vector are there) for vectors of channels.
template <typename T, typename Body>
PVK_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
  for (int64_t c = begin; c < end; c += kLanes<T>) body(c, end - c < kLanes<T> ? end - c : int64_t(kLanes<T>));
}

template <typename scalar_t>
PVK_INLINE Vec<opmath_t<scalar_t>> load_some(const scalar_t* source, int64_t count) {
  return count == kLanes<opmath_t<scalar_t>> ? load(source) : load_first(source, count);
}

template <typename scalar_t>
PVK_INLINE void store_some(scalar_t* target, Vec<opmath_t<scalar_t>> value, int64_t count) {
  if (count == kLanes<opmath_t<scalar_t>>) {
    store(target, value);
  } else {
    store_first(target, value, count);
  }
}

// output = f(input, channel, image), vector by vector.
template <typename scalar_t, typename Function>
void for_each(const MapParams& p, int64_t output_pitch, const Function& f) {
  using T = opmath_t<scalar_t>;
  const Memory<scalar_t> memory(p);
  const int64_t pixels = p.H * p.W;
  parallel_for(p.N * pixels, max_of<int64_t>(1, kPiece / max_of<int64_t>(1, p.C)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const scalar_t* const from = memory.input + i * p.C;
      scalar_t* const to = memory.output + i * output_pitch;
      const int64_t n = i / pixels;
      for_vectors<T>(0, p.C, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        store_some(to + c, f(load_some(from + c, count), n, c, count), count);
      });
    }
  });
}

template <typename scalar_t>
void affine(const MapParams& p) {
  using T = opmath_t<scalar_t>;
  const T* const scale = static_cast<const T*>(p.scale);
  const T* const shift = static_cast<const T*>(p.shift);
  with_activation(p.activation, [&](auto tag) __attribute__((always_inline)) {
    for_each<scalar_t>(p, p.C, [&](Vec<T> x, int64_t, int64_t c, int64_t count) __attribute__((always_inline)) {
      return finish<decltype(tag)::value, T>(x, load_some(scale + c, count), load_some(shift + c, count));
    });
  });
}

template <typename scalar_t>
void run_typed(const MapParams& p) {
  using T = opmath_t<scalar_t>;
  const Memory<scalar_t> memory(p);
  const MapSize size{p.N, p.C, p.H, p.W};
  switch (p.op) {
    case MapOp::kMean:
    case MapOp::kMaxPool:
      return;  // see run_map
    case MapOp::kScale:
      return for_each<scalar_t>(p, p.C, [&](Vec<T> x, int64_t n, int64_t c, int64_t count) {
        return x * load_some(memory.other + n * p.C + c, count);
      });
    case MapOp::kAffine:
      return affine<scalar_t>(p);
    case MapOp::kActivate:
      return with_activation(p.activation, [&](auto tag) __attribute__((always_inline)) {
        for_each<scalar_t>(p, p.C, [&](Vec<T> x, int64_t, int64_t, int64_t) __attribute__((always_inline)) {
          return activate<decltype(tag)::value, T>(x);
        });
      });
    case MapOp::kHardsigmoid:
      return for_each<scalar_t>(p, p.C, [&](Vec<T> x, int64_t, int64_t, int64_t) {
        return activate<Activation::kRelu6, T>(x + T(3)) / T(6);
      });
    case MapOp::kChannels:
      return for_each<scalar_t>(p, p.output_pitch, [&](Vec<T> x, int64_t, int64_t, int64_t) { return x; });
    case MapOp::kFlatten: {
      const int64_t stride[4] = {p.C * p.H * p.W, p.H * p.W, p.W, 1};
      return from_channels_last(size, memory.input, stride, memory.output);
    }
    case MapOp::kChannelsLast:
      return to_channels_last(size, memory.input, p.input_stride, memory.output);
  }
}

// The parameters that the two poolings share.
template <typename Params>
Params pooling(const MapParams& p, int64_t OH, int64_t OW) {
  Params pool{};
  pool.map = const_cast<void*>(p.input);
  pool.pooled = p.output;
  pool.dtype = p.dtype;
  pool.N = p.N;
  pool.C = p.C;
  const int64_t map_stride[4] = {p.H * p.W * p.C, 1, p.W * p.C, p.C};
  const int64_t pooled_stride[4] = {OH * OW * p.C, 1, OW * p.C, p.C};
  std::memcpy(pool.map_stride, map_stride, sizeof(map_stride));
  std::memcpy(pool.pooled_stride, pooled_stride, sizeof(pooled_stride));
  pool.channels_last = true;
  return pool;
}

void mean(const MapParams& p) {
  avg_pool2d::AvgPool2dParams pool = pooling<avg_pool2d::AvgPool2dParams>(p, 1, 1);
  pool.rows = {p.H, 1, 0, 1, 0, 1};
  pool.columns = {p.W, 1, 0, 1, 0, 1};
  avg_pool2d::forward(pool, nullptr);
}

void max_pool(const MapParams& p) {
  max_pool2d::MaxPool2dParams pool = pooling<max_pool2d::MaxPool2dParams>(p, p.OH, p.OW);
  pool.rows = {p.H, p.OH, p.kernel[0], p.stride[0], p.padding[0], 1};
  pool.columns = {p.W, p.OW, p.kernel[1], p.stride[1], p.padding[1], 1};
  max_pool2d::forward(pool, nullptr);
}

}  // namespace

void run_map(const MapParams& p) {
  if (p.op == MapOp::kMean) return mean(p);
  if (p.op == MapOp::kMaxPool) return max_pool(p);
  dispatch_floating(p.dtype, [&](auto scalar) { run_typed<decltype(scalar)>(p); });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, run_map, MapParams)

}  // namespace pvk::graph
