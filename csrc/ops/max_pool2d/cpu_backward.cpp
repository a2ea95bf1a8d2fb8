// The gradient of max pooling on the CPU for planes, and for channels_last maps with few channels.
//
// A task owns a band of rows of a plane's gradient, which fits the cache. It goes through the outputs whose windows
// touch the band and adds the gradients that fall into it: sums run over outputs in their order, whatever the bands.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/pool_rows.h"
#include "core/simd_pair.h"
#include "core/stream.h"
#include "ops/max_pool2d/cpu_kernels.h"

namespace pvk::max_pool2d::PVK_ISA {
namespace {

constexpr int64_t kPiece = 16384;           // elements of the gradient
constexpr int64_t kBandElements = 1 << 12;  // of it, of a task
constexpr int64_t kLine = 64;

// Sums as elements of the gradient, in their place; registers beyond the end may be written.
template <typename scalar_t, typename T>
PVK_INLINE void convert_in_place(T* sums, int64_t count) {
  scalar_t* const target = reinterpret_cast<scalar_t*>(sums);
  for (int64_t i = 0; i < count; i += kPair<scalar_t>) {
    const VecU16 both = narrow_two(load(sums + i), load(sums + i + kLanes<T>), scalar_t());
    std::memcpy(target + i, &both, sizeof(both));
  }
}

template <typename scalar_t>
void scatter(const MaxPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t G = p.channels_last ? p.C : 1, planes = p.channels_last ? p.N : p.N * p.C;
  const int64_t H = p.rows.size, W = p.columns.size, OH = p.rows.outputs, OW = p.columns.outputs;
  const int64_t band = min_of(H, max_of<int64_t>(1, kBandElements / (W * G))), bands = ceil_div(H, band);
  const bool past = goes_past_caches(planes * H * W * G * int64_t(sizeof(scalar_t)));
  const int64_t chunk = max_of<int64_t>(1, kPiece / (band * W * G));
  parallel_for(planes * bands, chunk, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(sizeof(T) == sizeof(scalar_t) && !past ? 0 : band * W * G + kPair<scalar_t> + kLine);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, first = task % bands * band, last = min_of(first + band, H);
      scalar_t* const target = static_cast<scalar_t*>(p.map) + (plane * H + first) * W * G;
      T* sums = scratch.data();
      if constexpr (sizeof(T) == sizeof(scalar_t))
        sums = past ? sums + reinterpret_cast<uintptr_t>(target) % kLine / sizeof(T) : target;
      const int64_t elements = (last - first) * W * G;
      fill(sums, elements, T(0));
      const int64_t from = p.rows.outputs_of(first).begin, to = p.rows.outputs_of(last - 1).end;
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + plane * OH * OW * G;
      const int32_t* const places = p.places + plane * OH * OW * G;
      const uint32_t base = uint32_t(first * W), pixels = uint32_t((last - first) * W);
      if (G == 1) {
        for (int64_t i = from * OW; i < to * OW; ++i) {
          const uint32_t place = uint32_t(places[i]) - base;
          if (place < pixels) sums[place] += T(to_float(grad[i]));
        }
      } else {
        for (int64_t i = from * OW; i < to * OW; ++i)
          for (int64_t c = 0; c < G; ++c) {
            const uint32_t place = uint32_t(places[i * G + c]) - base;
            if (place < pixels) sums[int64_t(place) * G + c] += T(to_float(grad[i * G + c]));
          }
      }
      if constexpr (sizeof(T) != sizeof(scalar_t)) {
        convert_in_place<scalar_t, T>(sums, elements);
      } else if (!past) {
        continue;
      }
      copy_out(target, sums, elements * int64_t(sizeof(scalar_t)), past);
    }
    if (past) end_of_streams();
  });
}

PVK_INLINE Mask<float> load_places(const int32_t* source, int64_t count, float) {
  Mask<float> places{};
  if (count >= kLanes<float>) {
    std::memcpy(&places, source, sizeof(places));
    return places;
  }
#if defined(__AVX512F__)
  return (Mask<float>)_mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), source);
#endif
  for (int64_t i = 0; i < count; ++i) places[i] = source[i];
  return places;
}
PVK_INLINE Mask<double> load_places(const int32_t* source, int64_t count, double) {
  Mask<double> places{};
  for (int64_t i = 0; i < kLanes<double> && i < count; ++i) places[i] = source[i];
  return places;
}

// Disjoint windows of 2 x 2 that begin with the map: each pixel takes the gradient of its window, or none.
template <typename scalar_t>
void take_halved(const MaxPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  using P = place_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t H = p.rows.size, W = p.columns.size, OH = p.rows.outputs, OW = p.columns.outputs;
  const Mask<T> lane = lane_numbers<T>(std::make_integer_sequence<int, kLanes<T>>{});
  parallel_for(p.N * p.C, max_of<int64_t>(1, kPiece / (H * W)), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + plane * OH * OW;
      const int32_t* const places = p.places + plane * OH * OW;
      scalar_t* const target = static_cast<scalar_t*>(p.map) + plane * H * W;
      for (int64_t y = 0; y < H; y += 2) {
        const int64_t oh = y / 2, rows = min_of(H - y, int64_t(2));
        for (int64_t i = 0; 2 * i < W; i += kLane) {
          Vec<T> value{};
          Mask<T> place = Mask<T>{} - 1;
          if (oh < OH && i < OW) {
            value = load_some(grad + oh * OW + i, OW - i);
            place = load_places(places + oh * OW + i, OW - i, T());
          }
          for (int64_t r = 0; r < rows; ++r) {
            const Mask<T> here = 2 * lane + P((y + r) * W + 2 * i);
            const Vec<T> even = (Vec<T>)((Mask<T>)value & (place == here));
            const Vec<T> odd = (Vec<T>)((Mask<T>)value & (place == here + 1));
            scalar_t* const to = target + (y + r) * W + 2 * i;
            if constexpr (kSplitsPairs<scalar_t>) {
              store_elements(to, Pair<T>(even, odd), min_of<int64_t>(W - 2 * i, kPair<scalar_t>));
              continue;
            }
            Vec<T> low, high;
            interleave<T>(even, odd, low, high);
            store_some(to, low, W - 2 * i);
            if (W - 2 * i > kLane) store_some(to + kLane, high, W - 2 * i - kLane);
          }
        }
      }
    }
  });
}

bool has_halved_planes(const MaxPool2dParams& p) {
  for (const PoolAxis& a : {p.rows, p.columns})
    if (a.kernel != 2 || a.stride != 2 || a.padding != 0 || a.dilation != 1) return false;
  return !p.channels_last || p.C == 1;
}

}  // namespace

void backward_rows(const MaxPool2dParams& given) {
  MaxPool2dParams p = given;
  make_plain(p.rows, p.columns);
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (has_halved_planes(p)) return take_halved<scalar_t>(p);
    scatter<scalar_t>(p);
  });
}

}  // namespace pvk::max_pool2d::PVK_ISA
