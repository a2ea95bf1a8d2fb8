// `_graph` on CUDA: a chain of layers in one launch. The instructions are those of graph.cpp that make a chain (conv2d,
// linear, flatten, each of the value before it), where `packed` is what convert/chain.py packs, and a linear layer's
// instruction has the number of an algorithm behind the activation, as a convolution's has.
//
// All indices and sizes are checked: wrong code is an error, not a crash.
#include "graph/chain.h"

#include <list>

#include "graph/code.h"
#include "ops/conv2d/binding.h"
#include "ops/linear/binding.h"

namespace pvk::graph {
namespace {

// Values are those of program.py.
enum class Kind : int64_t { kConv2d = 0, kLinear = 1, kFlatten = 9 };

class Chain {
 public:
  Chain(const Tensors& inputs, const Tensors& constants, const Tensor& code, Stream stream)
      : constants_(constants), stream_(stream), code_(code), like_(input_of(inputs)), input_(like_) {
    params_.dtype = dtype_of(kOp, "inputs", input_);
    PVK_CHECK(params_.dtype != DType::kFloat64, kOp, ": expected inputs to be float32, float16 or bfloat16 on CUDA");
    params_.input = input_.data();
    params_.N = input_.size(0);
    for (int i = 0; i < 4; ++i) params_.input_stride[i] = i < input_.dim() ? input_.stride(i) : 0;
    value_ = input_;
    for (int i = 1; i < 4; ++i) map_[i - 1] = i < input_.dim() ? input_.size(i) : 1;
    while (!code_.is_done()) step();
    PVK_CHECK(!held_.empty(), kOp, ": expected at least one layer");
  }

  // Whether one launch can run it.
  bool fits() { return fits_ && chain_fits(params_); }

  Tensor run(const Numbers& outputs) {
    Code said(outputs);
    const int64_t id = said.next(), channels_last = said.next(), rank = said.next();
    bool agree = id == values_ && rank == value_.dim();
    for (int64_t i = 0; agree && i < rank; ++i) agree = said.next() == value_.size(i);
    PVK_CHECK(agree && said.is_done(), kOp, ": expected outputs to say the size of the last value ", values_, ", ",
              shape_of(value_), ", alone");
    PVK_CHECK(fits(), kOp, ": expected at most ", kMostLayers, " layers whose maps fit into shared memory");
    const View& v = value_;
    const Tensor output =
        rank == 2 ? empty({v.size(0), v.size(1)}, like_.scalar_type(), like_)
                  : empty({v.size(0), v.size(1), v.size(2), v.size(3)}, like_.scalar_type(), like_, channels_last != 0);
    params_.output = data_of(output);
    const int64_t pixels = map_[1] * map_[2];
    const int64_t flat[4] = {map_[0] * pixels, pixels, map_[2], 1};
    for (int i = 0; i < 4; ++i) params_.output_stride[i] = rank == 4 ? output.stride(i) : flat[i];
    run_chain(params_, stream_);
    return output;
  }

 private:
  static const Tensor& input_of(const Tensors& inputs) {
    PVK_CHECK(inputs.size() == 1, kOp, ": expected one input on CUDA, but got ", inputs.size());
    PVK_CHECK(inputs[0].dim() == 2 || inputs[0].dim() == 4, kOp,
              ": expected the input to have 2 or 4 dimensions, but got ", shape_of(inputs[0]));
    return inputs[0];
  }

  void expect(int64_t wanted, const char* what) {
    const int64_t got = code_.next();
    PVK_CHECK(got == wanted, kOp, ": expected ", what, " to be ", wanted, " in a chain, but got ", got);
  }

  void step() {
    const int64_t kind = code_.next();
    expect(values_, "the value that is read");
    if (kind == int64_t(Kind::kFlatten)) {
      PVK_CHECK(value_.dim() == 4, kOp, ": expected a map to flatten, but got ", shape_of(value_));
      value_.numel();  // is below 2^63
      value_ = View(nullptr, {value_.size(0), map_[0] * map_[1] * map_[2]}, input_, false);
    } else if (kind == int64_t(Kind::kConv2d)) {
      conv2d();
    } else {
      PVK_CHECK(kind == int64_t(Kind::kLinear), kOp, ": expected an instruction of a chain, but got ", kind);
      linear();
    }
    ++values_;
    const int64_t freed = code_.next();
    for (int64_t i = 0; i < freed; ++i) {
      const int64_t id = code_.next();
      PVK_CHECK(id > 0 && id < values_, kOp, ": expected what is freed to be a value of the chain, but got ", id);
    }
  }

  void conv2d() {
    expect(-1, "the residual");
    held_.push_back({code_.constant(constants_), {}, {}, {}, {}});
    conv2d::Constants& constants = held_.back();
    for (auto* const held : {&constants.bias, &constants.scale, &constants.shift})
      *held = code_.optional_constant(constants_);
    const Tensor& packed = code_.constant(constants_);
    const int64_t activation = code_.next(), pool = code_.next(), algorithm = code_.next();
    const conv2d::Call call{code_.next(conv2d::kGeometryNumbers), activation, pool != 0, algorithm};
    const conv2d::Conv2dParams c = conv2d::prepare("conv2d", value_, constants, nullptr, call, stream_);
    PVK_CHECK(c.groups == 1 && c.padding_mode == conv2d::PaddingMode::kZeros, kOp,
              ": expected a convolution of a chain to have groups 1 and zero padding");
    for (int i = 0; i < 2; ++i) fits_ &= c.stride[i] <= kMostSize && c.dilation[i] <= kMostSize;
    fits_ &= c.padding_top <= kMostSize && c.padding_left <= kMostSize;
    ChainLayer& layer = add(c.K, {c.R, c.S, c.OH, c.OW}, packed, algorithm);
    layer.bias = c.bias;
    layer.scale = c.scale;
    layer.shift = c.shift;
    layer.bias_dtype = c.bias_dtype;
    layer.scale_dtype = c.scale_dtype;
    layer.activation = c.activation;
    layer.pool = c.pool;
    for (int i = 0; i < 2; ++i) {
      layer.stride[i] = int32_t(c.stride[i]);
      layer.dilation[i] = int32_t(c.dilation[i]);
    }
    layer.padding[0] = int32_t(c.padding_top);
    layer.padding[1] = int32_t(c.padding_left);
    value_ = View(nullptr, {c.N, c.K, c.rows_out(), c.columns_out()}, input_, true);
    for (int i = 0; i < 3; ++i) map_[i] = value_.size(i + 1);
  }

  // A convolution whose taps are the pixels of the map, to one pixel.
  void linear() {
    expect(-1, "the residual");
    held_.push_back({code_.constant(constants_), {}, {}, {}, {}});
    conv2d::Constants& held = held_.back();
    linear::Constants constants{held.weight, code_.optional_constant(constants_), {}};
    const Tensor& packed = code_.constant(constants_);
    const int64_t activation = code_.next(), algorithm = code_.next();
    const linear::LinearParams l = linear::prepare("linear", value_, constants, nullptr, activation, stream_);
    held.bias = constants.bias;  // contiguous now
    ChainLayer& layer = add(l.K, {map_[1], map_[2], 1, 1}, packed, algorithm);
    layer.bias = l.bias;
    layer.bias_dtype = l.bias_dtype;
    layer.activation = l.activation;
    for (int i = 0; i < 2; ++i) layer.stride[i] = layer.dilation[i] = 1;
    value_ = View(nullptr, {l.M, l.K}, input_, false);
    map_[0] = l.K;
    map_[1] = map_[2] = 1;
  }

  struct Taps {
    int64_t R, S, OH, OW;
  };

  // The next layer, of the map so far. Where there is no room for it, one that is not run.
  ChainLayer& add(int64_t K, const Taps& taps, const Tensor& packed, int64_t algorithm) {
    fits_ &= params_.N > 0 && params_.count < kMostLayers && taps.R <= kMostTaps && taps.S <= kMostTaps;
    for (const int64_t size : {map_[0], map_[1], map_[2], K, taps.OH, taps.OW}) fits_ &= size > 0 && size <= kMostSize;
    ChainLayer& layer = params_.layers[fits_ ? params_.count++ : 0];
    layer = {};
    layer.C = int32_t(map_[0]);
    layer.H = int32_t(map_[1]);
    layer.W = int32_t(map_[2]);
    layer.K = int32_t(K);
    layer.R = int32_t(taps.R);
    layer.S = int32_t(taps.S);
    layer.OH = int32_t(taps.OH);
    layer.OW = int32_t(taps.OW);
    layer.tf32 = algorithm == int64_t(conv2d::Algorithm::kTf32);
    if (!fits_) return layer;
    const int64_t bytes = layer.packed_bytes(element_size_of(params_.dtype));
    layer.packed = packed_data(kOp, packed, input_, bytes, "this weight in a chain");
    PVK_CHECK(uintptr_t(layer.packed) % 16 == 0, kOp, ": expected packed to be aligned to 16 bytes");
    return layer;
  }

  const Tensors& constants_;
  const Stream stream_;
  Code code_;
  const Tensor& like_;
  const View input_;
  View value_;           // as the checks of layers see it
  int64_t map_[3] = {};  // C, H, W of it, flattened or not
  int64_t values_ = 0;
  bool fits_ = true;
  std::list<conv2d::Constants> held_;  // until the kernel is queued
  ChainParams params_{};
};

Tensors graph_op(const Tensors& inputs, const Tensors& constants, const Numbers& outputs, const Tensor& code) {
  PVK_CHECK(!inputs.empty(), kOp, ": expected at least one input");
  const DeviceScope scope(inputs[0]);
  return {Chain(inputs, constants, code, scope.stream()).run(outputs)};
}

bool fits_op(const Tensors& inputs, const Tensors& constants, const Tensor& code) {
  PVK_CHECK(!inputs.empty(), kOp, ": expected at least one input");
  const DeviceScope scope(inputs[0]);
  return Chain(inputs, constants, code, scope.stream()).fits();
}

}  // namespace
}  // namespace pvk::graph

PVK_LIBRARY_IMPL(m) {
  m.impl("_graph", TORCH_BOX(&pvk::graph::graph_op));
  m.impl("_graph_fits", TORCH_BOX(&pvk::graph::fits_op));
}
