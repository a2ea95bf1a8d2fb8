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
      // As far from a cache line's begin as the target.
      T* sums = scratch.data() + reinterpret_cast<uintptr_t>(target) % kLine / sizeof(scalar_t);
      if constexpr (sizeof(T) == sizeof(scalar_t)) sums = past ? sums : target;
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

}  // namespace

void backward_rows(const MaxPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { scatter<decltype(scalar)>(p); });
}

}  // namespace pvk::max_pool2d::PVK_ISA
