// A graph of layers in one operator: runs the instructions that pyvision_kernels/convert/program.py writes.
//
// Values are numbered: the inputs, then one by each instruction. Inputs and outputs of the graph are tensors, what is
// between them lives in scratch memory, from the instruction that makes it to the one that frees it. All indices
// and sizes are checked: wrong code is an error, not a crash.
#include <memory>
#include <optional>
#include <vector>

#include "core/binding.h"
#include "core/scratch.h"
#include "graph/maps.h"
#include "ops/conv2d/binding.h"
#include "ops/linear/binding.h"

namespace pvk::graph {
namespace {

constexpr const char* kOp = "_graph";

// Values are those of program.py; beyond kLinear they are those of MapOp.
enum class Kind : int64_t { kConv2d, kLinear, kMap };

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

using Block = std::shared_ptr<void>;

// Memory of a map of these sizes.
Block acquire(const View& map, int64_t element_size) {
  int64_t bytes = element_size;
  for (int64_t i = 0; i < map.dim(); ++i)
    PVK_CHECK(!__builtin_mul_overflow(bytes, map.size(i), &bytes), kOp,
              ": expected a map that fits into memory, but got ", shape_of(map));
  return Block(acquire_scratch(bytes), [bytes](void* data) { release_scratch(data, bytes); });
}

struct Value {
  View view;
  Block block;                   // of a value within the graph
  std::optional<Tensor> output;  // of one that leaves it
  bool lives = false;
};

class Interpreter {
 public:
  Interpreter(const Tensors& inputs, const Tensors& constants, const Numbers& code, Stream stream)
      : constants_(constants), code_(code), stream_(stream), like_(inputs[0]) {
    for (const Tensor& input : inputs) {
      check_same_device(kOp, "inputs", input, "the first", inputs[0]);
      PVK_CHECK(input.dim() <= 4 && input.scalar_type() == inputs[0].scalar_type(), kOp,
                ": expected inputs to have at most 4 dimensions and one dtype, but got ", shape_of(input), " of ",
                input.scalar_type());
      values_.push_back({View(input), nullptr, std::nullopt, true});
    }
  }

  Tensors run() {
    const int64_t instructions = next(), outputs = next();
    PVK_CHECK(instructions >= 0 && instructions <= int64_t(code_.size()) && outputs >= 0 && outputs <= instructions,
              kOp, ": expected code to have at most as many outputs as instructions, but got ", outputs, " and ",
              instructions);
    const int64_t inputs = int64_t(values_.size());
    is_output_.assign(size_t(inputs + instructions), false);
    Numbers leaving;
    for (int64_t i = 0; i < outputs; ++i) {
      leaving.push_back(next());
      PVK_CHECK(leaving.back() >= inputs && leaving.back() < inputs + instructions, kOp,
                ": expected an output to be the result of an instruction, but got ", leaving.back());
      is_output_[size_t(leaving.back())] = true;
    }
    for (int64_t i = 0; i < instructions; ++i) step();
    Tensors results;
    for (const int64_t id : leaving) results.push_back(*values_[size_t(id)].output);
    return results;
  }

 private:
  int64_t next() {
    PVK_CHECK(at_ < code_.size(), kOp, ": expected code to have more than ", code_.size(), " numbers");
    return code_[at_++];
  }

  const int64_t* next(size_t count) {
    PVK_CHECK(count <= code_.size() - at_, kOp, ": expected code to have more than ", code_.size(), " numbers");
    at_ += count;
    return code_.data() + at_ - count;
  }

  Value& value() {
    const int64_t id = next();
    PVK_CHECK(id >= 0 && id < int64_t(values_.size()) && values_[size_t(id)].lives, kOp,
              ": expected an operand to be a value that was made and not freed, but got ", id);
    return values_[size_t(id)];
  }

  const Tensor& constant() {
    const std::optional<Tensor> tensor = optional_constant();
    PVK_CHECK(tensor, kOp, ": expected an instruction to have its constants");
    return constants_[size_t(code_[at_ - 1])];
  }

  std::optional<Tensor> optional_constant() {
    const int64_t index = next();
    if (index == -1) return std::nullopt;
    PVK_CHECK(index >= 0 && index < int64_t(constants_.size()), kOp, ": expected an index below ", constants_.size(),
              " of a constant, but got ", index);
    return constants_[size_t(index)];
  }

  // The next value, dense.
  Value make(std::initializer_list<int64_t> sizes, bool channels_last) {
    Value made;
    made.lives = true;
    if (is_output_[values_.size()]) {
      made.output = empty(sizes, like_.scalar_type(), like_, channels_last);
      made.view = View(*made.output);
      return made;
    }
    const View shape(nullptr, sizes, View(like_), channels_last);
    made.block = acquire(shape, int64_t(like_.element_size()));
    made.view = View(made.block.get(), sizes, shape, channels_last);
    return made;
  }

  void step() {
    const int64_t kind = next();
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
    const int64_t freed = next();
    for (int64_t i = 0; i < freed; ++i) {
      Value& dead = value();
      dead.lives = false;
      dead.block = nullptr;
    }
  }

  const View* residual() {
    PVK_CHECK(at_ < code_.size(), kOp, ": expected code to have more than ", code_.size(), " numbers");
    if (code_[at_] != -1) return &value().view;
    ++at_;
    return nullptr;
  }

  Value conv2d() {
    const View& input = value().view;
    const View* const added = residual();
    conv2d::Constants constants{constant(), {}, {}, {}, {}};
    for (auto* const held : {&constants.bias, &constants.scale, &constants.shift, &constants.packed})
      *held = optional_constant();
    const int64_t activation = next(), pool = next(), channels_last = next(), algorithm = next();
    const conv2d::Call call{next(conv2d::kGeometryNumbers), activation, pool != 0, algorithm};
    conv2d::Conv2dParams p = conv2d::prepare("conv2d", input, constants, added, call, stream_);
    Value made = make({p.N, p.K, p.rows_out(), p.columns_out()}, channels_last != 0);
    conv2d::run(p, made.view, stream_);
    return made;
  }

  Value linear() {
    const View& input = value().view;
    const View* const added = residual();
    linear::Constants constants{constant(), {}, {}};
    for (auto* const held : {&constants.bias, &constants.packed}) *held = optional_constant();
    const int64_t activation = next();
    linear::LinearParams p = linear::prepare("linear", input, constants, added, activation, stream_);
    Value made = make({p.M, p.K}, false);
    linear::run(p, made.view, stream_);
    return made;
  }

  static bool is_dense_channels_last(const View& view) {
    const View dense(nullptr, {view.size(0), view.size(1), view.size(2), view.size(3)}, view, true);
    for (int64_t i = 0; i < 4; ++i)
      if (view.size(i) > 1 && view.stride(i) != dense.stride(i)) return false;
    return true;
  }

  MapParams params_of(MapOp op, const View& view) {
    PVK_CHECK(view.dim() == 4, kOp, ": expected a map to have 4 dimensions [N, C, H, W], but got ", shape_of(view));
    MapParams p{};
    p.op = op;
    p.dtype = dtype_of(kOp, "inputs", view);
    p.scale_dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    p.input = view.data();
    p.N = view.size(0);
    p.C = view.size(1);
    p.H = view.size(2);
    p.W = view.size(3);
    return p;
  }

  // A map as the kernels want it; `copy` keeps it where it was another.
  MapParams dense(MapOp op, const View& view, Block& copy) {
    MapParams p = params_of(op, view);
    if (view.numel() == 0 || is_dense_channels_last(view)) return p;
    MapParams turn = p;
    turn.op = MapOp::kChannelsLast;
    for (int i = 0; i < 4; ++i) turn.input_stride[i] = view.stride(i);
    copy = acquire(view, int64_t(like_.element_size()));
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
        for (int i = 0; i < 2; ++i) pair[i] = next();
      rows = p.OH = pooled(p, 0, p.H);
      columns = p.OW = pooled(p, 1, p.W);
    } else if (op == MapOp::kScale) {
      const View other = value().view;
      const MapParams by = dense(op, other, other_copy);
      PVK_CHECK(by.N == p.N && by.C == p.C && by.H == 1 && by.W == 1, kOp, ": expected a factor of size [", p.N, ", ",
                p.C, ", 1, 1], but got ", shape_of(other));
      p.other = by.input;
    } else if (op == MapOp::kAffine) {
      scale = channels(p, "scale");
      shift = channels(p, "shift");
      p.scale = data_of(scale);
      p.shift = data_of(shift);
    }
    if (op == MapOp::kAffine || op == MapOp::kActivate) {
      const int64_t activation = next();
      PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kSigmoid), kOp,
                ": expected activation to be 0 to 6, but got ", activation);
      p.activation = Activation(activation);
    }
    Value made = op == MapOp::kFlatten ? make({p.N, p.C * p.H * p.W}, false) : make({p.N, p.C, rows, columns}, true);
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
    const Tensor& tensor = constant();
    PVK_CHECK(tensor.dim() == 1 && tensor.size(0) == p.C && tensor.is_contiguous(), kOp, ": expected ", name,
              " to have size [", p.C, "], but got ", shape_of(tensor));
    PVK_CHECK(dtype_of(kOp, name, tensor) == p.scale_dtype, kOp, ": expected ", name,
              " to be float64 beside float64, else float32, but got ", tensor.scalar_type());
    check_same_device(kOp, name, tensor, "inputs", like_);
    return tensor;
  }

  Value concatenate() {
    const int64_t count = next();
    PVK_CHECK(count > 0, kOp, ": expected at least one map to concatenate, but got ", count);
    std::vector<View> parts;
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      parts.push_back(value().view);
      const View &part = parts.back(), &first = parts[0];
      PVK_CHECK(part.dim() == 4 && part.size(0) == first.size(0) && part.size(2) == first.size(2) &&
                    part.size(3) == first.size(3),
                kOp, ": expected maps to differ in channels alone, but got ", shape_of(part), " and ", shape_of(first));
      total += part.size(1);
    }
    Value made = make({parts[0].size(0), total, parts[0].size(2), parts[0].size(3)}, true);
    char* to = static_cast<char*>(made.view.data());
    for (const View& part : parts) {
      Block copy;
      MapParams p = dense(MapOp::kChannels, part, copy);
      p.output = to;
      p.output_pitch = total;
      if (part.numel() > 0) run_map(p, stream_);
      to += part.size(1) * int64_t(like_.element_size());
    }
    return made;
  }

  const Tensors& constants_;
  const Numbers& code_;
  size_t at_ = 0;
  const Stream stream_;
  const Tensor& like_;
  std::vector<Value> values_;
  std::vector<bool> is_output_;
};

Tensors graph_op(const Tensors& inputs, const Tensors& constants, const Numbers& code) {
  PVK_CHECK(!inputs.empty(), kOp, ": expected at least one input");
  const DeviceScope scope(inputs[0]);
  return Interpreter(inputs, constants, code, scope.stream()).run();
}

}  // namespace
}  // namespace pvk::graph

PVK_LIBRARY_IMPL(m) {
  m.impl("_graph", TORCH_BOX(&pvk::graph::graph_op));
}
