#include <stdexcept>
#include "ops/attention/cpu_kernels.h"
namespace pvk::attention::PVK_ISA {
void backward(const AttentionBackwardParams&) { throw std::runtime_error("stub"); }
}
