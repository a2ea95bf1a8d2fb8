#include "core/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace pvk {

void run_workers(int64_t workers, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

int64_t thread_count() {
  return torch::stable::get_num_threads();
}

}  // namespace pvk
