// GatherGemm on tensor cores, of bfloat16.
#include "ops/conv2d/gather_gemm.cuh"

namespace pvk::conv2d {

void run_bfloat16(const GatherGemm& gemm, const Plan& plan, Stream stream) {
  run_mma<__nv_bfloat16>(gemm, plan, stream);
}

}  // namespace pvk::conv2d
