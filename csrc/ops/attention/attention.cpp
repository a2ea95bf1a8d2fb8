// Binding of attention: tensors -> checks -> AttentionParams -> the backend's kernel.
#include "ops/attention/attention.h"

#include <limits>
#include <optional>
#include <tuple>

#include "core/binding.h"

namespace pvk::attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

ScalarType opmath_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_rows(const char* op, const char* argument, const Tensor& rows, const Tensor& query) {
  PVK_CHECK(rows.dim() == 4, op, ": expected ", argument, " to have 4 dimensions, but got ", shape_of(rows));
  PVK_CHECK(rows.scalar_type() == query.scalar_type(), op, ": expected ", argument, " to be ", query.scalar_type(),
            " as query is, but got ", rows.scalar_type());
  PVK_CHECK(rows.stride(3) == 1 || rows.size(3) <= 1 || rows.numel() == 0, op, ": expected ", argument,
            " to have a last stride of 1, but got ", rows.stride(3));
  check_same_device(op, argument, rows, "query", query);
}

void check_size(const char* op, const char* argument, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == int64_t(sizes.size());
  std::ostringstream text;
  int64_t i = 0;
  for (const int64_t size : sizes) {
    text << (i ? ", " : "") << size;
    fits = fits && tensor.size(i++) == size;
  }
  PVK_CHECK(fits, op, ": expected ", argument, " to have size [", text.str(), "], but got ", shape_of(tensor));
}

void take_strides(int64_t (&strides)[3], const Tensor& tensor) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// Rows of a result: a head's next to each other, or, where they are not in what it is a result for, a row's heads.
Tensor new_rows(const Tensor& like, int64_t features) {
  const int64_t B = like.size(0), H = like.size(1), L = like.size(2);
  if (like.stride(1) >= like.stride(2)) return empty({B, H, L, features}, like.scalar_type(), like);
  return torch::stable::transpose(empty({B, L, H, features}, like.scalar_type(), like), 1, 2);
}

BiasKind kind_of(const char* op, const Tensor& bias, const Tensor& query) {
  if (bias.scalar_type() == ScalarType::Bool) return BiasKind::kBool;
  if (bias.scalar_type() == query.scalar_type()) return BiasKind::kAdded;
  PVK_CHECK(bias.scalar_type() == ScalarType::Float && query.scalar_type() != ScalarType::Double, op,
            ": expected bias to be bool, ", query.scalar_type(), " as query is, or float32 beside 16 bits, but got ",
            bias.scalar_type());
  return BiasKind::kAddedFloat;
}

// All but the results and the scratch. Inside a DeviceScope.
AttentionParams params_of(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                          const OptionalTensor& bias, const OptionalTensor& key_lengths, const OptionalTensor& seed,
                          double scale, int64_t left, int64_t right, double dropout_p) {
  AttentionParams p{};
  p.dtype = dtype_of(op, "query", query);
  check_rows(op, "query", query, query);
  check_rows(op, "key", key, query);
  check_rows(op, "value", value, query);
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3);
  p.G = key.size(1), p.S = key.size(2), p.E = value.size(3);
  check_size(op, "key", key, {p.B, p.G, p.S, p.D});
  check_size(op, "value", value, {p.B, p.G, p.S, p.E});
  PVK_CHECK(p.G > 0 ? p.H % p.G == 0 : p.H == 0, op, ": expected query's ", p.H,
            " heads to be a multiple of key's, but got ", p.G);
  PVK_CHECK(p.D >= 1 && p.E >= 1 && p.D <= kMaxFeatures && p.E <= kMaxFeatures, op, ": expected 1 to ", kMaxFeatures,
            " features of a head, but got ", p.D, " and ", p.E);
  PVK_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": expected dropout_p to be in [0, 1), but got ", dropout_p);
  p.query = data_of(query);
  p.key = data_of(key);
  p.value = data_of(value);
  take_strides(p.query_stride, query);
  take_strides(p.key_stride, key);
  take_strides(p.value_stride, value);
  if (bias) {
    p.bias_kind = kind_of(op, *bias, query);
    check_same_device(op, "bias", *bias, "query", query);
    PVK_CHECK(bias->dim() == 4, op, ": expected bias to have 4 dimensions, but got ", shape_of(*bias));
    const int64_t sizes[4] = {p.B, p.H, p.L, p.S};
    for (int i = 0; i < 4; ++i) {
      PVK_CHECK(bias->size(i) == sizes[i] || bias->size(i) == 1, op, ": expected bias to have sizes of 1 or of [", p.B,
                ", ", p.H, ", ", p.L, ", ", p.S, "], but got ", shape_of(*bias));
      p.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    p.bias = data_of(*bias);
  }
  const auto integers = [&](const char* argument, const Tensor& tensor, int64_t size) {
    check_size(op, argument, tensor, {size});
    check_same_device(op, argument, tensor, "query", query);
    PVK_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), op, ": expected ", argument,
              " to be contiguous and int64, but got ", tensor.scalar_type());
    return static_cast<const int64_t*>(data_of(tensor));
  };
  if (key_lengths) p.key_lengths = integers("key_lengths", *key_lengths, p.B);
  PVK_CHECK(seed || dropout_p == 0, op, ": expected a seed where dropout_p is not 0, but got none");
  if (seed && dropout_p > 0) p.seed = integers("seed", *seed, 1);
  p.scale = scale;
  p.left = left < 0 ? p.S + p.L : min_of(left, p.S + p.L);
  p.right = right < 0 ? p.S + p.L : min_of(right, p.S + p.L);
  p.dropout_p = dropout_p;
  return p;
}

Tensor scratch_of(int64_t bytes, const Tensor& like) {
  return empty({bytes}, ScalarType::Byte, like);
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const OptionalTensor& bias, const OptionalTensor& key_lengths,
                                      const OptionalTensor& seed, double scale, int64_t left, int64_t right,
                                      double dropout_p) {
  const DeviceScope scope(query);
  AttentionParams p = params_of("attention", query, key, value, bias, key_lengths, seed, scale, left, right, dropout_p);
  Tensor output = new_rows(query, p.E);
  Tensor lse = empty({p.B, p.H, p.L}, opmath_of(query), query);
  if (lse.numel() == 0) return {output, lse};
  if (p.S == 0) {
    torch::stable::zero_(output);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {output, lse};
  }
  p.output = data_of(output);
  take_strides(p.output_stride, output);
  p.lse = data_of(lse);
  const Tensor scratch = scratch_of(forward_scratch(p), query);
  p.scratch = data_of(scratch);
  forward(p, scope.stream());
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(const Tensor& grad_output, const OptionalTensor& grad_lse,
                                                       const Tensor& query, const Tensor& key, const Tensor& value,
                                                       const OptionalTensor& bias, const OptionalTensor& key_lengths,
                                                       const OptionalTensor& seed, const Tensor& output,
                                                       const Tensor& lse, double scale, int64_t left, int64_t right,
                                                       double dropout_p, bool needs_bias) {
  constexpr const char* kOp = "_attention_backward";
  const DeviceScope scope(query);
  AttentionBackwardParams p{};
  AttentionParams& f = p.forward;
  f = params_of(kOp, query, key, value, bias, key_lengths, seed, scale, left, right, dropout_p);
  for (const auto& [name, rows] : {std::pair{"grad_output", &grad_output}, std::pair{"output", &output}}) {
    check_rows(kOp, name, *rows, query);
    check_size(kOp, name, *rows, {f.B, f.H, f.L, f.E});
  }
  const auto check_stats = [&](const char* argument, const Tensor& tensor) {
    check_size(kOp, argument, tensor, {f.B, f.H, f.L});
    check_same_device(kOp, argument, tensor, "query", query);
    PVK_CHECK(tensor.scalar_type() == opmath_of(query) && tensor.is_contiguous(), kOp, ": expected ", argument,
              " to be contiguous and ", opmath_of(query), ", but got ", tensor.scalar_type());
  };
  check_stats("lse", lse);
  if (grad_lse) check_stats("grad_lse", *grad_lse);
  PVK_CHECK(!needs_bias || (bias && f.bias_kind != BiasKind::kBool), kOp,
            ": expected bias to be added where its gradient is asked for");
  const Tensor grad_query = new_rows(query, f.D), grad_key = new_rows(key, f.D), grad_value = new_rows(value, f.E);
  const Tensor grad_bias =
      needs_bias ? empty({bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, bias->scalar_type(), query)
                 : empty({0}, query.scalar_type(), query);
  if (f.B == 0 || f.H == 0 || f.S == 0 || f.L == 0) {
    for (Tensor grad : {grad_query, grad_key, grad_value, grad_bias}) torch::stable::zero_(grad);
    return {grad_query, grad_key, grad_value, grad_bias};
  }
  f.output = data_of(output);
  f.lse = data_of(lse);
  p.grad_output = data_of(grad_output);
  p.grad_lse = grad_lse ? data_of(*grad_lse) : nullptr;
  p.grad_query = data_of(grad_query);
  p.grad_key = data_of(grad_key);
  p.grad_value = data_of(grad_value);
  if (needs_bias) {
    p.grad_bias = data_of(grad_bias);
    for (int i = 0; i < 4; ++i) p.bias_size[i] = bias->size(i);
  }
  take_strides(f.output_stride, output);
  take_strides(p.grad_output_stride, grad_output);
  take_strides(p.grad_query_stride, grad_query);
  take_strides(p.grad_key_stride, grad_key);
  take_strides(p.grad_value_stride, grad_value);
  const Tensor scratch = scratch_of(backward_scratch(p), query);
  p.scratch = data_of(scratch);
  backward(p, scope.stream());
  return {grad_query, grad_key, grad_value, grad_bias};
}

}  // namespace
}  // namespace pvk::attention

PVK_LIBRARY_IMPL(m) {
  m.impl("attention", TORCH_BOX(&pvk::attention::forward_op));
  m.impl("_attention_backward", TORCH_BOX(&pvk::attention::backward_op));
}
