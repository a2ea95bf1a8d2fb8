// The gradient of conv2d with respect to its input, on CUDA: the same product over grad_output, by phases of the stride
// (gather_gemm.h). Nothing is spread by zeros, and every element is summed by one thread block.
#include "ops/conv2d/cuda_kernels.h"
#include "ops/conv2d/gather_gemm.h"

namespace pvk::conv2d {

void backward_input(const BackwardInputParams& p, Stream stream) {
  if (is_depthwise(p)) return backward_input_depthwise(p, stream);
  GatherGemm gemm = gather_gemm_of(p);
  gemm.weight = p.workspace;
  gemm.partial = static_cast<unsigned char*>(p.workspace) + weight_bytes(gemm);
  pack_weight(gemm, p, p.workspace, stream);
  run(gemm, stream);
}

int64_t workspace_bytes(const BackwardInputParams& p) {
  if (is_depthwise(p)) return 0;
  const GatherGemm gemm = gather_gemm_of(p);
  return weight_bytes(gemm) + partial_bytes(gemm);
}

}  // namespace pvk::conv2d
