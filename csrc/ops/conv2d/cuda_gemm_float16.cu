// GatherGemm on tensor cores, of float16.
#include "ops/conv2d/gather_gemm.cuh"

namespace pvk::conv2d {

void run_float16(const GatherGemm& gemm, const Plan& plan, Stream stream) {
  run_mma<__half>(gemm, plan, stream);
}

}  // namespace pvk::conv2d
