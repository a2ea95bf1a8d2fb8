// A graph of layers in one operator: runs the instructions that pyvision_kernels/convert/program.py writes.
//
// Values are numbered: the inputs, then one by each instruction. Inputs and outputs of the graph are tensors, what is
// between them lives in scratch memory, from the instruction that makes it to the one that frees it. All indices
// and sizes are checked: wrong code is an error, not a crash.
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "core/scratch.h"
#include "graph/code.h"
#include "graph/maps.h"
#include "ops/conv2d/binding.h"
#include "ops/linear/binding.h"

namespace pvk::graph {
namespace {

// Values are those of program.py; beyond kLinear they are those of MapOp.
enum class Kind : int64_t { kConv2d, kLinear, kMap };

using Block = std::shared_ptr<void>;

// Memory of a map of these sizes.
Block acquire(const View& map, int64_t element_size) {
  int64_t bytes = element_size;
  for (int64_t i = 0; i < map.dim(); ++i)
    PVK_CHECK(!__builtin_mul_overflow(bytes, map.size(i), &bytes), kOp,
              ": expected a map that fits into memory, but got ", shape_of(map));
  return Block(acquire_scratch(bytes), [bytes](void* data) { release_scratch(data, bytes); });
}

// What is said beforehand of a value that leaves the graph.
struct Output {
  int64_t id;
  bool channels_last;
  Numbers sizes;
};

struct Value {
  View view;
  Block block;                   // of a value within the graph
  std::optional<Tensor> output;  // of one that leaves it
  bool lives = false;
};

class Interpreter {
 public:
  Interpreter(const Tensors& inputs, const Tensors& constants, const Numbers& outputs, const Tensor& code,
              Stream stream)
      : constants_(constants), code_(code), stream_(stream), like_(inputs[0]), element_size_(like_.element_size()) {
    for (const Tensor& input : inputs) {
      check_same_device(kOp, "inputs", input, "the first", inputs[0]);
      PVK_CHECK(input.dim() <= 4 && input.scalar_type() == inputs[0].scalar_type(), kOp,
                ": expected inputs to have at most 4 dimensions and one dtype, but got ", shape_of(input), " of ",
                input.scalar_type());
      values_.push_back({View(input), nullptr, std::nullopt, true});
    }
    Code said(outputs);
    while (!said.is_done()) {
      Output output{said.next(), said.next() != 0, {}};
      const int64_t rank = said.next();
      PVK_CHECK(rank == 2 || rank == 4, kOp, ": expected an output to have 2 or 4 dimensions, but got ", rank);
      for (int64_t i = 0; i < rank; ++i) output.sizes.push_back(said.next());
      PVK_CHECK(output_of(output.id) == nullptr, kOp, ": expected an output to be named once, but got ", output.id,
                " twice");
      outputs_.push_back(std::move(output));
    }
  }

  Tensors run() {
    const int64_t inputs = int64_t(values_.size());
    while (!code_.is_done()) step();
    Tensors results;
    for (const Output& output : outputs_) {
      PVK_CHECK(output.id >= inputs && output.id < int64_t(values_.size()), kOp,
                ": expected an output to be the result of an instruction, but got ", output.id);
      results.push_back(*values_[size_t(output.id)].output);
    }
    return results;
  }

 private:
  const Output* output_of(int64_t id) const {
    for (const Output& output : outputs_)
      if (output.id == id) return &output;
    return nullptr;
  }

  Value& value() {
    const int64_t id = code_.next();
    PVK_CHECK(id >= 0 && id < int64_t(values_.size()) && values_[size_t(id)].lives, kOp,
              ": expected an operand to be a value that was made and not freed, but got ", id);
    return values_[size_t(id)];
  }

  const View* optional_map() { return code_.is_absent() ? nullptr : &value().view; }

  // Maps within the graph are channels_last; of those that leave it, a convolution's may be contiguous.
  bool leaves_contiguous() const {
    const Output* const output = output_of(int64_t(values_.size()));
    return output != nullptr && !output->channels_last;
  }

  // The next value, dense; 4 dimensions are channels_last, or contiguous.
  Value make(std::initializer_list<int64_t> sizes, bool channels_last) {
    Value made;
    made.lives = true;
    const View shape(nullptr, sizes, values_[0].view, channels_last);
    if (const Output* const output = output_of(int64_t(values_.size()))) {
      PVK_CHECK(output->channels_last == channels_last &&
                    std::equal(sizes.begin(), sizes.end(), output->sizes.begin(), output->sizes.end()),
                kOp, ": expected outputs to say the size and the layout of value ", values_.size(), ", ",
                shape_of(shape));
      made.output = empty(sizes, like_.scalar_type(), like_, channels_last);
      made.view = View(*made.output);
      return made;
    }
    made.block = acquire(shape, element_size_);
    made.view = View(made.block.get(), sizes, shape, channels_last);
    return made;
  }

  void step() {
    const int64_t kind = code_.next();
    Value made;
    if (kind == int64_t(Kind::kConv2d)) {
      made = conv2d();
    } else if (kind == int64_t(Kind::kLinear)) {
      made = linear();
    } else {
      const int64_t op = kind - int64_t(Kind::kMap);
      PVK_CHECK(op >= 0 && op < int64_t(MapOp::kChannelsLast), kOp, ": expected a known instruction, but got ", kind);
      made = map(MapOp(op));
    }
    values_.push_back(std::move(made));
    const int64_t freed = code_.next();
    for (int64_t i = 0; i < freed; ++i) {
      Value& dead = value();
      dead.lives = false;
      dead.block = nullptr;
    }
  }

  Value conv2d() {
    const View& input = value().view;
    const View* const residual = optional_map();
    conv2d::Constants constants{code_.constant(constants_), {}, {}, {}, {}};
    for (auto* const held : {&constants.bias, &constants.scale, &constants.shift, &constants.packed})
      *held = code_.optional_constant(constants_);
    const int64_t activation = code_.next(), pool = code_.next(), algorithm = code_.next();
    const conv2d::Call call{code_.next(conv2d::kGeometryNumbers), activation, pool != 0, algorithm};
    conv2d::Conv2dParams p = conv2d::prepare("conv2d", input, constants, residual, call, stream_);
    Value made = make({p.N, p.K, p.rows_out(), p.columns_out()}, !leaves_contiguous());
    conv2d::run(p, made.view, stream_);
    return made;
  }

  Value linear() {
    const View& input = value().view;
    const View* const residual = optional_map();
    linear::Constants constants{code_.constant(constants_), {}, {}};
    for (auto* const held : {&constants.bias, &constants.packed}) *held = code_.optional_constant(constants_);
    const int64_t activation = code_.next();
    linear::LinearParams p = linear::prepare("linear", input, constants, residual, activation, stream_);
    Value made = make({p.M, p.K}, false);
    linear::run(p, made.view, stream_);
    return made;
  }

  static bool is_dense_channels_last(const View& view) {
    const int64_t pixels = view.dim() == 4 ? view.size(2) * view.size(3) : 1;
    const int64_t dense[] = {view.size(1) * pixels, 1, view.size(1) * view.size(3), view.size(1)};
    for (int64_t i = 0; i < view.dim(); ++i)
      if (view.size(i) > 1 && view.stride(i) != dense[i]) return false;
    return true;
  }

  MapParams params_of(MapOp op, const View& view) {
    const bool takes_rows =
        op == MapOp::kScale || op == MapOp::kActivate || op == MapOp::kHardsigmoid || op == MapOp::kChannels;
    PVK_CHECK(view.dim() == 4 || (takes_rows && view.dim() == 2), kOp, ": expected a map to have 4 dimensions ",
              "[N, C, H, W], or 2 where it is not pooled, normalised or flattened, but got ", shape_of(view));
    MapParams p{};
    p.op = op;
    p.dtype = dtype_of(kOp, "inputs", view);
    p.scale_dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    p.input = view.data();
    p.N = view.size(0);
    p.C = view.size(1);
    p.H = view.dim() == 4 ? view.size(2) : 1;
    p.W = view.dim() == 4 ? view.size(3) : 1;
    return p;
  }

  // A map as the kernels want it; `copy` keeps it where it was another.
  MapParams dense(MapOp op, const View& view, Block& copy) {
    MapParams p = params_of(op, view);
    if (view.numel() == 0 || is_dense_channels_last(view)) return p;
    MapParams turn = p;
    turn.op = MapOp::kChannelsLast;
    for (int64_t i = 0; i < view.dim(); ++i) turn.input_stride[i] = view.stride(i);
    copy = acquire(view, element_size_);
    p.input = turn.output = copy.get();
    run_map(turn, stream_);
    return p;
  }

  Value map(MapOp op) {
    if (op == MapOp::kChannels) return concatenate();
    const View input = value().view;
    Block copy;
    MapParams p = dense(op, input, copy);
    Block other_copy;
    Tensor scale, shift;
    int64_t rows = p.H, columns = p.W;
    if (op == MapOp::kMean) {
      rows = columns = 1;
    } else if (op == MapOp::kMaxPool) {
      for (int64_t* const pair : {p.kernel, p.stride, p.padding})
        for (int i = 0; i < 2; ++i) pair[i] = code_.next();
      rows = p.OH = pooled(p, 0, p.H);
      columns = p.OW = pooled(p, 1, p.W);
    } else if (op == MapOp::kScale) {
      const View other = value().view;
      const MapParams by = dense(op, other, other_copy);
      PVK_CHECK(other.dim() == input.dim() && by.N == p.N && by.C == p.C && by.H == 1 && by.W == 1, kOp,
                ": expected a factor for each channel of ", shape_of(input), ", but got ", shape_of(other));
      p.other = by.input;
    } else if (op == MapOp::kAffine) {
      scale = channels(p, "scale");
      shift = channels(p, "shift");
      p.scale = data_of(scale);
      p.shift = data_of(shift);
    }
    if (op == MapOp::kAffine || op == MapOp::kActivate) {
      const int64_t activation = code_.next();
      PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kSigmoid), kOp,
                ": expected activation to be 0 to 6, but got ", activation);
      p.activation = Activation(activation);
    }
    Value made = op == MapOp::kFlatten ? make({p.N, p.C * p.H * p.W}, false)
                 : input.dim() == 2    ? make({p.N, p.C}, false)
                                       : make({p.N, p.C, rows, columns}, true);
    p.output = made.view.data();
    if (made.view.numel() > 0) run_map(p, stream_);
    return made;
  }

  // Of the pooled map, rows (axis 0) or columns; each window has a pixel.
  static int64_t pooled(const MapParams& p, int axis, int64_t size) {
    constexpr int64_t kLargest = int64_t(1) << 31;
    const int64_t kernel = p.kernel[axis], stride = p.stride[axis], padding = p.padding[axis];
    PVK_CHECK(kernel > 0 && kernel < kLargest && stride > 0 && stride < kLargest && padding >= 0 &&
                  2 * padding <= kernel && size > 0 && size + 2 * padding >= kernel,
              kOp, ": expected a window that fits into ", size, " pixels, with at most half of it as padding, but got ",
              kernel, " with stride ", stride, " and padding ", padding);
    return (size + 2 * padding - kernel) / stride + 1;
  }

  Tensor channels(const MapParams& p, const char* name) {
    const Tensor& tensor = code_.constant(constants_);
    PVK_CHECK(tensor.dim() == 1 && tensor.size(0) == p.C && tensor.is_contiguous(), kOp, ": expected ", name,
              " to have size [", p.C, "], but got ", shape_of(tensor));
    PVK_CHECK(dtype_of(kOp, name, tensor) == p.scale_dtype, kOp, ": expected ", name,
              " to be float64 beside float64, else float32, but got ", tensor.scalar_type());
    check_same_device(kOp, name, tensor, "inputs", like_);
    return tensor;
  }

  Value concatenate() {
    const int64_t count = code_.next();
    PVK_CHECK(count > 0, kOp, ": expected at least one map to concatenate, but got ", count);
    std::vector<View> parts;
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      parts.push_back(value().view);
      const View &part = parts.back(), &first = parts[0];
      PVK_CHECK((part.dim() == 4 || part.dim() == 2) && part.dim() == first.dim() && part.size(0) == first.size(0) &&
                    part.size(2) == first.size(2) && part.size(3) == first.size(3),
                kOp, ": expected maps to differ in channels alone, but got ", shape_of(part), " and ", shape_of(first));
      total += part.size(1);
    }
    const View& first = parts[0];
    Value made = first.dim() == 2 ? make({first.size(0), total}, false)
                                  : make({first.size(0), total, first.size(2), first.size(3)}, true);
    char* to = static_cast<char*>(made.view.data());
    for (const View& part : parts) {
      Block copy;
      MapParams p = dense(MapOp::kChannels, part, copy);
      p.output = to;
      p.output_pitch = total;
      if (part.numel() > 0) run_map(p, stream_);
      to += part.size(1) * element_size_;
    }
    return made;
  }

  const Tensors& constants_;
  Code code_;
  const Stream stream_;
  const Tensor& like_;
  const int64_t element_size_;
  std::vector<Value> values_;
  std::vector<Output> outputs_;
};

Tensors graph_op(const Tensors& inputs, const Tensors& constants, const Numbers& outputs, const Tensor& code) {
  PVK_CHECK(!inputs.empty(), kOp, ": expected at least one input");
  const DeviceScope scope(inputs[0]);
  return Interpreter(inputs, constants, outputs, code, scope.stream()).run();
}

}  // namespace
}  // namespace pvk::graph

PVK_LIBRARY_IMPL(m) {
  m.impl("_graph", TORCH_BOX(&pvk::graph::graph_op));
}
