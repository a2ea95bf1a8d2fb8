#include <stdexcept>
#include "core/isa.h"
#include "ops/attention/attention.h"
namespace pvk::attention {
namespace PVK_ISA {
namespace {}
int64_t forward_scratch_of(const AttentionParams&) {
  return 0;
}
int64_t backward_scratch_of(const AttentionBackwardParams&) {
  return 0;
}
void forward(const AttentionParams&) {
  throw std::runtime_error("stub");
}
void backward(const AttentionBackwardParams&) {
  throw std::runtime_error("stub");
}
}  // namespace PVK_ISA
PVK_CPU_ENTRY(void, forward, AttentionParams)
PVK_CPU_ENTRY(void, backward, AttentionBackwardParams)
#if defined(PVK_ISA_BASELINE)
int64_t forward_scratch(const AttentionParams&) {
  return 0;
}
int64_t backward_scratch(const AttentionBackwardParams&) {
  return 0;
}
#endif
}  // namespace pvk::attention
