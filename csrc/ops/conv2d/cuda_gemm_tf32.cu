// GatherGemm on tensor cores, of float32 rounded to tf32.
#include "ops/conv2d/gather_gemm.cuh"

namespace pvk::conv2d {

void run_tf32(const GatherGemm& gemm, const Plan& plan, Stream stream) {
  run_mma<float>(gemm, plan, stream);
}

}  // namespace pvk::conv2d
