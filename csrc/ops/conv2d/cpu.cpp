// conv2d on the CPU: picks the algorithm, and brings maps into the layout that it wants.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

// Runs `algorithm`, which takes channels_last maps only, on maps of any layout.
template <typename Algorithm>
void in_channels_last(const Conv2dParams& p, const Algorithm& algorithm) {
  const MapSize in{p.N, p.C, p.H, p.W};
  const MapSize out{p.N, p.K, p.rows_out(), p.columns_out()};
  const bool input_fits = p.input_stride[1] == 1 || p.C == 1;
  const bool output_fits = p.output_stride[1] == 1 || p.K == 1;
  if (input_fits && output_fits) return algorithm(p);
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    Conv2dParams inner = p;
    Buffer<scalar_t> input, output;
    if (!input_fits) {
      input.reserve(in.N * in.C * in.H * in.W);
      to_channels_last(in, static_cast<const scalar_t*>(p.input), p.input_stride, input.data());
      inner.input = input.data();
      set_channels_last(inner.input_stride, in);
    }
    if (!output_fits) {
      output.reserve(out.N * out.C * out.H * out.W);
      inner.output = output.data();
      set_channels_last(inner.output_stride, out);
    }
    algorithm(inner);
    if (!output_fits) from_channels_last(out, output.data(), p.output_stride, static_cast<scalar_t*>(p.output));
  });
}

}  // namespace

void forward(const Conv2dParams& p) {
  switch (p.algorithm) {
    case Algorithm::kDirect:
      return in_channels_last(p, forward_direct);
    case Algorithm::kWinograd2:
    case Algorithm::kWinograd4:
      return in_channels_last(p, forward_winograd);
    case Algorithm::kDepthwise:
      return forward_depthwise(p);
    case Algorithm::kFewChannels:
      return forward_few_channels(p);
    case Algorithm::kTf32:  // refused by the binding
      return;
  }
}

int64_t packed_bytes(const Conv2dParams& p) {
  switch (p.algorithm) {
    case Algorithm::kDirect:
      return packed_bytes_direct(p);
    case Algorithm::kWinograd2:
    case Algorithm::kWinograd4:
      return packed_bytes_winograd(p);
    case Algorithm::kDepthwise:
      return packed_bytes_depthwise(p);
    case Algorithm::kFewChannels:
      return packed_bytes_few_channels(p);
    case Algorithm::kTf32:
      return 0;
  }
  return 0;
}

void pack(const PackParams& p) {
  switch (p.algorithm) {
    case Algorithm::kDirect:
      return pack_direct(p);
    case Algorithm::kWinograd2:
    case Algorithm::kWinograd4:
      return pack_winograd(p);
    case Algorithm::kDepthwise:
      return pack_depthwise(p);
    case Algorithm::kFewChannels:
      return pack_few_channels(p);
    case Algorithm::kTf32:
      return;
  }
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, Conv2dParams)
PVK_CPU_ENTRY(int64_t, packed_bytes, Conv2dParams)
PVK_CPU_ENTRY(void, pack, PackParams)

}  // namespace pvk::conv2d
