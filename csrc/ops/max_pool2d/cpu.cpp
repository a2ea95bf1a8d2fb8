// Max pooling on the CPU: which kernel serves which layout; the partial inverse.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/max_pool2d/cpu_kernels.h"

namespace pvk::max_pool2d {
namespace PVK_ISA {
namespace {

// Registers along channels are at least half full.
bool runs_along_channels(const MaxPool2dParams& p) {
  return p.channels_last && p.C * (p.dtype == DType::kFloat64 ? 2 : 1) * 2 >= kLanes<float>;
}

// A task is a plane, or an image of channels_last: elements with the same place keep their order.
template <typename scalar_t>
int64_t unpool_typed(const MaxUnpool2dParams& p) {
  const int64_t G = p.channels_last ? p.C : 1, planes = p.channels_last ? p.N : p.N * p.C;
  const int64_t in = p.pixels_in * G, out = p.pixels_out * G;
  int64_t invalid = planes * in;  // the first element whose place is outside
  parallel_for(planes, max_of<int64_t>(1, 16384 / max_of<int64_t>(1, out)), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      scalar_t* const target = static_cast<scalar_t*>(p.output) + plane * out;
      const scalar_t* const source = static_cast<const scalar_t*>(p.input) + plane * in;
      const int64_t* const places = p.places + plane * in;
      __builtin_memset(target, 0, size_t(out) * sizeof(scalar_t));
      int64_t first = 0;
      if (G == 1) {  // up to a place that is outside
        for (; first < in && uint64_t(places[first]) < uint64_t(out); ++first) target[places[first]] = source[first];
      }
      for (int64_t i = first; i < p.pixels_in; ++i)
        for (int64_t c = 0; c < G; ++c) {
          const int64_t element = i * G + c, place = places[element];
          if (place >= 0 && place < p.pixels_out) {
            target[place * G + c] = source[element];
            continue;
          }
          const int64_t mine = plane * in + element;
          int64_t seen = __atomic_load_n(&invalid, __ATOMIC_RELAXED);
          while (mine < seen &&
                 !__atomic_compare_exchange_n(&invalid, &seen, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
        }
    }
  });
  return invalid == planes * in ? -1 : invalid;
}

}  // namespace

void forward(const MaxPool2dParams& p) {
  if (runs_along_channels(p)) return forward_channels(p);
  forward_rows(p);
}

void backward(const MaxPool2dParams& p) {
  if (runs_along_channels(p)) return backward_channels(p);
  backward_rows(p);
}

int64_t unpool(const MaxUnpool2dParams& p) {
  int64_t result = -1;
  dispatch_floating(p.dtype, [&](auto scalar) { result = unpool_typed<decltype(scalar)>(p); });
  return result;
}

int64_t owner_elements(const MaxUnpool2dParams&) {
  return 0;
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, MaxPool2dParams)
PVK_CPU_ENTRY(void, backward, MaxPool2dParams)
PVK_CPU_ENTRY(int64_t, unpool, MaxUnpool2dParams)
PVK_CPU_ENTRY(int64_t, owner_elements, MaxUnpool2dParams)

}  // namespace pvk::max_pool2d
