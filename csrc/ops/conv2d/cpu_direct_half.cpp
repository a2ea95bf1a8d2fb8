// Direct convolution on the CPU of 16-bit types: bfloat16 by dot products where the CPU has them, else in float32, to
// which the input is converted once.
#include "core/isa.h"
#include "core/types.h"
#include "ops/conv2d/cpu_direct_run.h"

namespace pvk::conv2d::PVK_ISA {
namespace {

// Groups that share a register are shuffled, which pairs of channels cannot be.
[[maybe_unused]] bool takes_dot(const Conv2dParams& p) {
  return p.dtype == DType::kBFloat16 && cpu_has_bfloat16_dot() &&
         !shuffles_groups<float>(p.C / p.groups, p.K / p.groups, p.groups);
}

}  // namespace

void forward_direct_half(const Conv2dParams& p) {
#if defined(__AVX512F__)
  if (takes_dot(p)) return forward_typed<BFloat16, BFloat16>(p);
#endif
  p.dtype == DType::kBFloat16 ? forward_typed<float, BFloat16>(p) : forward_typed<float, Float16>(p);
}

int64_t packed_bytes_direct_half(const Conv2dParams& p) {
#if defined(__AVX512F__)
  if (takes_dot(p)) return packed_bytes_typed<BFloat16>(p);
#endif
  return packed_bytes_typed<float>(p);
}

void pack_direct_half(const Conv2dParams& p, void* target) {
#if defined(__AVX512F__)
  if (takes_dot(p)) return pack_typed<BFloat16, BFloat16>(p, target);
#endif
  p.dtype == DType::kBFloat16 ? pack_typed<float, BFloat16>(p, target) : pack_typed<float, Float16>(p, target);
}

}  // namespace pvk::conv2d::PVK_ISA
