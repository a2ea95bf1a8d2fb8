// What a GatherGemm is of a convolution and of a gradient, how it is cut into tiles, and the order of its weight.
#include "core/launch.h"
#include "core/warp.cuh"
#include "ops/conv2d/gather_gemm.h"

namespace pvk::conv2d {
namespace {

constexpr int kBlockThreads = 256;
constexpr int64_t kProcessors = 132;  // that a small problem is cut for; more or fewer change the time alone
constexpr int64_t kLeastSteps = 8;    // of the reduction, for which a part of it is worth a block
constexpr int64_t kMostSplits = 16;
constexpr int64_t kNear = int64_t(1) << 29;  // coordinates of vector loads fit int

Axis axis_of(const Conv2dParams& p, int axis) {
  const int64_t divisor = std::gcd(p.stride[axis], p.dilation[axis]);
  Axis a = {};
  a.taps = axis == 0 ? p.R : p.S;
  a.stride = p.stride[axis];
  a.dilation = p.dilation[axis];
  a.padding = axis == 0 ? p.padding_top : p.padding_left;
  a.period = a.stride / divisor;
  a.tap = a.dilation / divisor;
  return a;
}

GatherGemm common_of(const Conv2dParams& p) {
  GatherGemm g = {};
  g.dtype = p.dtype;
  g.bias = p.bias;
  g.bias_dtype = p.bias_dtype;
  g.tf32 = p.dtype == DType::kFloat32 && p.algorithm == Algorithm::kTf32;
  g.activation = p.activation;
  g.padding_mode = p.padding_mode;
  g.images = p.N;
  g.groups = p.groups;
  for (int a = 0; a < 2; ++a) g.axes[a] = axis_of(p, a);
  return g;
}

void copy4(int64_t (&to)[4], const int64_t (&from)[4]) {
  for (int i = 0; i < 4; ++i) to[i] = from[i];
}

int64_t vector_elements(DType dtype) {
  return 16 / element_bytes(dtype);
}

void set_pitch(GatherGemm& g) {
  g.pitch = ceil_div(g.depth(), vector_elements(g.dtype)) * vector_elements(g.dtype);
}

bool reads_vectors(const GatherGemm& g) {
  const int64_t vec = vector_elements(g.dtype);
  if (g.padding_mode != PaddingMode::kZeros || g.channels == 0 || g.channels % vec != 0) return false;
  if (reinterpret_cast<uintptr_t>(g.source) % 16 != 0 || g.source_stride[1] != 1) return false;
  const int64_t sizes[4] = {g.images, 1, g.axes[0].source, g.axes[1].source};
  for (int i = 0; i < 4; ++i)
    if (sizes[i] > 1 && g.source_stride[i] % vec != 0) return false;
  for (const Axis& a : g.axes) {
    if (a.source >= kNear || a.padding >= kNear || a.taps >= kNear || a.taps * a.dilation >= kNear) return false;
    if (a.result >= kNear || a.stride >= kNear || a.result * a.stride >= kNear) return false;
  }
  return g.depth() < kNear;
}

template <typename Word>
struct PackWeight {
  const Word* from;
  Word* to;
  int64_t group_stride, output_stride, channel_stride, tap_stride[2];
  int64_t count;
};

// Thread i writes element i of [classes of phases][groups][outputs][pitch], zero beyond the taps of the class.
template <typename Word>
__global__ void __launch_bounds__(kBlockThreads) pack_weight_kernel(const GatherGemm p, const PackWeight<Word> w) {
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < w.count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    int64_t row = i / p.pitch;
    const int64_t k = i - row * p.pitch, tap = k / p.channels, channel = k - tap * p.channels;
    const int64_t output = row % p.outputs;
    row /= p.outputs;
    const int64_t group = row % p.groups, index = row / p.groups;
    const int64_t first[2] = {index / p.classes(1), index % p.classes(1)};
    const int64_t step[2] = {p.transposed ? p.axes[0].period : 1, p.transposed ? p.axes[1].period : 1};
    const int64_t columns = ceil_div(p.axes[1].taps - first[1], step[1]);
    const int64_t r = first[0] + tap / columns * step[0], s = first[1] + tap % columns * step[1];
    w.to[i] = r < p.axes[0].taps ? __ldg(w.from + group * w.group_stride + output * w.output_stride +
                                         channel * w.channel_stride + r * w.tap_stride[0] + s * w.tap_stride[1])
                                 : Word(0);
  }
}

template <typename Word>
void pack_words(const GatherGemm& g, const Conv2dParams& p, void* target, Stream stream) {
  const int64_t* const stride = p.weight_stride;
  PackWeight<Word> w = {};
  w.from = static_cast<const Word*>(p.weight);
  w.to = static_cast<Word*>(target);
  w.group_stride = (g.transposed ? g.channels : g.outputs) * stride[0];
  w.output_stride = g.transposed ? stride[1] : stride[0];
  w.channel_stride = g.transposed ? stride[0] : stride[1];
  w.tap_stride[0] = stride[2];
  w.tap_stride[1] = stride[3];
  w.count = weight_bytes(g) / int64_t(sizeof(Word));
  const int64_t blocks = min_of(ceil_div(w.count, int64_t(kBlockThreads)), int64_t(1) << 20);
  launch(pack_weight_kernel<Word>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, g, w);
}

}  // namespace

GatherGemm gather_gemm_of(const Conv2dParams& p) {
  GatherGemm g = common_of(p);
  g.source = p.input;
  g.scale = p.scale;
  g.shift = p.shift;
  g.scale_dtype = p.scale_dtype;
  g.residual = p.residual;
  g.output = p.output;
  g.pool = p.pool;
  g.channels = p.C / p.groups;
  g.outputs = p.K / p.groups;
  g.axes[0].source = p.H;
  g.axes[1].source = p.W;
  g.axes[0].result = p.whole_rows();
  g.axes[1].result = p.whole_columns();
  copy4(g.source_stride, p.input_stride);
  copy4(g.residual_stride, p.residual_stride);
  copy4(g.output_stride, p.output_stride);
  set_pitch(g);
  return g;
}

GatherGemm gather_gemm_of(const BackwardInputParams& p) {
  GatherGemm g = common_of(p);
  g.transposed = true;
  g.source = p.grad_output;
  g.output = p.grad_input;
  g.channels = p.K / p.groups;
  g.outputs = p.C / p.groups;
  g.axes[0].source = p.OH;
  g.axes[1].source = p.OW;
  g.axes[0].result = p.H;
  g.axes[1].result = p.W;
  copy4(g.source_stride, p.grad_output_stride);
  copy4(g.output_stride, p.grad_input_stride);
  set_pitch(g);
  return g;
}

bool is_packed(const GatherGemm& g, const Conv2dParams& p) {
  if (g.transposed || g.pitch != g.depth() || reinterpret_cast<uintptr_t>(p.weight) % 16 != 0) return false;
  const int64_t sizes[4] = {p.K, g.channels, p.R, p.S};
  const int64_t wanted[4] = {g.pitch, 1, p.S * g.channels, g.channels};
  for (int i = 0; i < 4; ++i)
    if (sizes[i] > 1 && p.weight_stride[i] != wanted[i]) return false;
  return true;
}

int64_t weight_bytes(const GatherGemm& g) {
  return g.classes(0) * g.classes(1) * g.groups * g.outputs * g.pitch * element_bytes(g.dtype);
}

void pack_weight(const GatherGemm& g, const Conv2dParams& p, void* target, Stream stream) {
  if (weight_bytes(g) == 0) return;
  switch (element_bytes(g.dtype)) {
    case 2:
      return pack_words<uint16_t>(g, p, target, stream);
    case 4:
      return pack_words<uint32_t>(g, p, target, stream);
    default:
      return pack_words<uint64_t>(g, p, target, stream);
  }
}

Plan plan_of(const GatherGemm& g) {
  int64_t rows = g.images, phases = 1;
  for (int a = 0; a < 2; ++a) {
    rows *= g.transposed ? ceil_div(g.axes[a].result, g.axes[a].stride) : g.axes[a].result;
    phases *= g.phases(a);
  }
  const auto plan_for = [&](TileSize tile, int64_t block_m, int64_t block_n) {
    return Plan{tile, reads_vectors(g), ceil_div(rows, block_m), ceil_div(g.outputs, block_n), 1};
  };
  const auto blocks_of = [&](const Plan& plan) { return plan.tiles_m * plan.tiles_n * g.groups * phases; };
  // The largest tile that keeps all processors busy.
  const bool on_tensor_cores = g.tf32 || (g.dtype != DType::kFloat32 && g.dtype != DType::kFloat64);
  if (on_tensor_cores) {
    const Plan narrow = plan_for(TileSize::k128x32, 128, 32), half = plan_for(TileSize::k128x64, 128, 64);
    const Plan whole = plan_for(TileSize::k128x128, 128, 128);
    if (g.outputs <= 32 && blocks_of(narrow) >= kProcessors) return narrow;
    if (g.outputs > 64 && blocks_of(whole) >= kProcessors) return whole;
    if (blocks_of(half) >= kProcessors) return half;
  }
  Plan plan = plan_for(TileSize::k64x64, 64, 64);
  const int64_t steps = ceil_div(g.depth() * element_bytes(g.dtype), int64_t(64));
  const int64_t wanted = min_of(2 * kProcessors / max_of(blocks_of(plan), int64_t(1)), kMostSplits);
  plan.splits = max_of(min_of(wanted, steps / kLeastSteps), int64_t(1));
  return plan;
}

int64_t partial_bytes(const GatherGemm& g) {
  const Plan plan = plan_of(g);
  if (plan.splits == 1) return 0;
  const int64_t element = g.dtype == DType::kFloat64 ? 8 : 4;
  return plan.splits * plan.tiles_m * plan.tiles_n * g.groups * g.phases(0) * g.phases(1) * (64 * 64 * element);
}

void run(const GatherGemm& g, Stream stream) {
  const Plan plan = plan_of(g);
  switch (g.dtype) {
    case DType::kFloat16:
      return run_float16(g, plan, stream);
    case DType::kBFloat16:
      return run_bfloat16(g, plan, stream);
    case DType::kFloat32:
      return g.tf32 ? run_tf32(g, plan, stream) : run_fma(g, plan, stream);
    case DType::kFloat64:
      return run_fma(g, plan, stream);
  }
}

}  // namespace pvk::conv2d
