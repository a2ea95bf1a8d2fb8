// GatherGemm by fused multiply-adds: float32 whose products are exact, and float64.
#include "ops/conv2d/gather_gemm.cuh"

namespace pvk::conv2d {

void run_fma(const GatherGemm& gemm, const Plan& plan, Stream stream) {
  if (gemm.dtype == DType::kFloat64) return run_policy<FmaPolicy<double, 64, 64, 4, 4>>(gemm, plan, stream);
  run_policy<FmaPolicy<float, 64, 64, 8, 4>>(gemm, plan, stream);
}

}  // namespace pvk::conv2d
