// Binding of group_norm: tensors -> checks -> GroupNormParams -> the backend's kernel.
#include "ops/group_norm/group_norm.h"

#include "core/norm_binding.h"

namespace pvk::group_norm {
namespace {

// Whether the map is channels_last.
template <typename Params>
bool fill_size(Params& p, const char* op, const Tensor& input, int64_t groups) {
  const bool channels_last = fill_map(p, op, input);
  PVK_CHECK(groups >= 1 && p.C % groups == 0, op, ": expected num_groups to divide ", p.C, " channels, but got ",
            groups);
  p.G = groups;
  p.rows = channels_last || p.S == 1;
  return channels_last;
}

// Some bytes on the device; none where the kernel wants none.
template <typename Params>
OptionalTensor scratch_of(Params& p, const Tensor& like) {
  const int64_t bytes = scratch_bytes(p);
  if (bytes == 0) return std::nullopt;
  const Tensor scratch = empty({bytes}, ScalarType::Byte, like);
  p.scratch = data_of(scratch);
  return scratch;
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                      const OptionalTensor& bias, int64_t groups, double eps, int64_t activation) {
  constexpr const char* kOp = "group_norm";
  const DeviceScope scope(input);
  GroupNormParams p{};
  const bool channels_last = fill_size(p, kOp, input, groups);
  fill_forward(p, kOp, input, channels_last, residual, weight, bias, activation);
  const Tensor output = new_like(input);
  const Tensor stats = empty({2, p.N, p.G}, stats_dtype(input), input);
  p.output = data_of(output);
  p.stats = data_of(stats);
  p.eps = eps;
  const OptionalTensor scratch = scratch_of(p, input);
  forward(p, scope.stream());
  return {output, stats};
}

Gradients backward_op(const Tensor& grad, const Tensor& input, const OptionalTensor& output, const Tensor& stats,
                      const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups, int64_t activation,
                      bool needs_input, bool needs_residual, bool needs_weight, bool needs_bias) {
  constexpr const char* kOp = "_group_norm_backward";
  const DeviceScope scope(input);
  GroupNormBackwardParams p{};
  const bool channels_last = fill_size(p, kOp, input, groups);
  PVK_CHECK(stats.dim() == 3 && stats.size(0) == 2 && stats.size(1) == p.N && stats.size(2) == p.G &&
                stats.is_contiguous() && stats.scalar_type() == stats_dtype(input),
            kOp, ": expected stats to be those of the forward, [2, ", p.N, ", ", p.G, "], but got ", shape_of(stats));
  const Gradients gradients = fill_backward(p, kOp, grad, input, channels_last, output, stats, weight, bias, activation,
                                            {needs_input, needs_residual, needs_weight, needs_bias});
  const OptionalTensor scratch = scratch_of(p, input);
  backward(p, scope.stream());
  return gradients;
}

}  // namespace
}  // namespace pvk::group_norm

PVK_LIBRARY_IMPL(m) {
  m.impl("group_norm", TORCH_BOX(&pvk::group_norm::forward_op));
  m.impl("_group_norm_backward", TORCH_BOX(&pvk::group_norm::backward_op));
}
