#include <stdexcept>
#include "ops/attention/attention.h"
namespace pvk::attention {
int64_t forward_scratch(const AttentionParams&) {
  return 0;
}
int64_t backward_scratch(const AttentionBackwardParams&) {
  return 0;
}
void forward(const AttentionParams&, Stream) {
  throw std::runtime_error("stub");
}
void backward(const AttentionBackwardParams&, Stream) {
  throw std::runtime_error("stub");
}
}  // namespace pvk::attention
