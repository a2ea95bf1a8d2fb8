// Direct convolution on the CPU: float32 and float64; the kernel is cpu_direct_run.h.
#include "core/types.h"
#include "ops/conv2d/cpu_direct_run.h"
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d::PVK_ISA {

void forward_direct(const Conv2dParams& p) {
  if (p.N * p.K * p.rows_out() * p.columns_out() == 0) return;
  if (p.dtype == DType::kFloat32) return forward_typed<float, float>(p);
  if (p.dtype == DType::kFloat64) return forward_typed<double, double>(p);
  forward_direct_half(p);
}

int64_t packed_bytes_direct(const Conv2dParams& p) {
  if (p.dtype == DType::kFloat32) return packed_bytes_typed<float>(p);
  if (p.dtype == DType::kFloat64) return packed_bytes_typed<double>(p);
  return packed_bytes_direct_half(p);
}

void pack_direct(const PackParams& p) {
  if (p.dtype == DType::kFloat32) return pack_typed<float, float>(p, p.target);
  if (p.dtype == DType::kFloat64) return pack_typed<double, double>(p, p.target);
  pack_direct_half(p, p.target);
}

}  // namespace pvk::conv2d::PVK_ISA
