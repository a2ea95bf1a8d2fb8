// conv2d on CUDA: depthwise by kernels of its own, any other convolution as an implicit matrix product (gather_gemm.h).
#include "ops/conv2d/cuda_kernels.h"
#include "ops/conv2d/gather_gemm.h"

namespace pvk::conv2d {
namespace {

bool packed_is_given(const Conv2dParams& p) {
  return p.packed != nullptr && reinterpret_cast<uintptr_t>(p.packed) % 16 == 0;
}

// Of the workspace, where the weight is packed for this call.
int64_t own_weight_bytes(const GatherGemm& gemm, const Conv2dParams& p) {
  return is_packed(gemm, p) || packed_is_given(p) ? 0 : weight_bytes(gemm);
}

}  // namespace

void forward(const Conv2dParams& p, Stream stream) {
  if (is_depthwise(p)) return forward_depthwise(p, stream);
  GatherGemm gemm = gather_gemm_of(p);
  const int64_t bytes = own_weight_bytes(gemm, p);
  if (is_packed(gemm, p)) {
    gemm.weight = p.weight;
  } else if (packed_is_given(p)) {
    gemm.weight = p.packed;
  } else {
    gemm.weight = p.workspace;
    pack_weight(gemm, p, p.workspace, stream);
  }
  gemm.partial = static_cast<unsigned char*>(p.workspace) + bytes;
  run(gemm, stream);
}

int64_t packed_bytes(const Conv2dParams& p, Stream) {
  if (is_depthwise(p)) return 0;
  const GatherGemm gemm = gather_gemm_of(p);
  return is_packed(gemm, p) ? 0 : weight_bytes(gemm);
}

void pack(const PackParams& p, Stream stream) {
  pack_weight(gather_gemm_of(p), p, p.target, stream);
}

int64_t workspace_bytes(const Conv2dParams& p) {
  if (is_depthwise(p)) return 0;
  const GatherGemm gemm = gather_gemm_of(p);
  return own_weight_bytes(gemm, p) + partial_bytes(gemm);
}

}  // namespace pvk::conv2d
