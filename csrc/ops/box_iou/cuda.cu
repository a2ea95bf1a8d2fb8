// Pairwise overlap of boxes on CUDA. The backward is one kernel, run for each set that needs a gradient: a thread owns
// a box and adds up a fixed chunk of the others; a second kernel adds the chunks in order.
#include <stdexcept>
#include <string>

#include "core/dispatch.cuh"
#include "core/launch.h"
#include "ops/box_iou/box_iou.h"
#include "ops/box_iou/device_boxes.cuh"

namespace pvk::box_iou {
namespace {

constexpr int kWarps = 8, kBlockThreads = kWarps * kWarpSize;
constexpr int kColumns = 4;          // of a lane: 128 columns a block
constexpr int kRows = 64;            // of a block
constexpr int kOwners = 128;         // boxes of a block of the backward: its threads
constexpr int kOthers = 32;          // boxes that are in shared memory at a time
constexpr int64_t kChunk = 256;      // others of a block, at least
constexpr int64_t kMaxChunks = 256;  // so that the partial sums stay small
constexpr int64_t kMaxGrid = 2147483647;

// A lane owns kColumns columns 32 apart and keeps their boxes, a warp every eighth row of the block's 64. Stores of a
// warp are 32 neighbours.
template <typename scalar_t, Kind kKind>
__global__ void __launch_bounds__(kBlockThreads) box_iou_forward_kernel(const __grid_constant__ BoxIouParams p) {
  using T = opmath_t<scalar_t>;
  using V = Rounded<T>;
  SIMT_SHARED(Box<V>[kRows], rows);
  constexpr int kBlockColumns = kColumns * kWarpSize;
  const Constants<V> constants = constants_of<T>(0, p.eps, p.eps);
  const int64_t tiles = ceil_div(p.M, int64_t(kBlockColumns)), row_blocks = ceil_div(p.N, int64_t(kRows));
  const int64_t batch = blockIdx.x / tiles / row_blocks;
  const int64_t first_row = int64_t(blockIdx.x) / tiles % row_blocks * kRows;
  const int64_t first_column = int64_t(blockIdx.x) % tiles * kBlockColumns + threadIdx.x % kWarpSize;

  if (threadIdx.x < kRows && first_row + threadIdx.x < p.N) {
    V c[4];
    load_coordinates<scalar_t>(p.boxes1, batch * p.boxes1_stride[0] + (first_row + threadIdx.x) * p.boxes1_stride[1],
                               p.boxes1_stride[2], c);
    rows[threadIdx.x] = prepare_box<kKind>(p.format, c, constants);
  }
  Box<V> mine[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const int64_t j = first_column + k * kWarpSize;
    if (j >= p.M) continue;
    V c[4];
    load_coordinates<scalar_t>(p.boxes2, batch * p.boxes2_stride[0] + j * p.boxes2_stride[1], p.boxes2_stride[2], c);
    mine[k] = prepare_box<kKind>(p.format, c, constants);
  }
  __syncthreads();

  T* const output = static_cast<T*>(p.output) + batch * p.N * p.M;
  for (int r = threadIdx.x / kWarpSize; r < kRows && first_row + r < p.N; r += kWarps) {
    const Box<V> a = rows[r];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int64_t j = first_column + k * kWarpSize;
      if (j < p.M) {
        output[(first_row + r) * p.M + j] = Pair<kKind, false, V>(a, mine[k], constants).value(constants).value;
      }
    }
  }
}

// The boxes that get a gradient, and the others.
struct Side {
  const void *own, *other;
  int64_t own_count, other_count, batches, chunks, chunk;
  int64_t own_stride[3], other_stride[3];
  int64_t grad_batch_stride, grad_own_stride, grad_other_stride;
  const void* grad;
  void* sums;    // [batches * chunks, grad fields, own_count]
  void* target;  // [batches, own_count, 4]
  Format format;
  double eps;
};

// A thread owns one box; a block brings 32 others and their 32 x 128 gradients to shared memory at a time, along
// whichever axis has neighbours, and leaves the sums over its chunk of the others: sums of sums of 32.
template <typename scalar_t, Kind kKind>
__global__ void __launch_bounds__(kOwners, 2) box_iou_backward_kernel(const __grid_constant__ Side s) {
  using T = opmath_t<scalar_t>;
  using V = Rounded<T>;
  SIMT_SHARED(Box<V>[kOthers], others);
  SIMT_SHARED(T[kOthers][kOwners + 1], grads);
  const Constants<V> constants = constants_of<T>(0, s.eps, s.eps);
  const int64_t own_blocks = ceil_div(s.own_count, int64_t(kOwners));
  const int64_t first_own = int64_t(blockIdx.x) % own_blocks * kOwners, own = first_own + threadIdx.x;
  const int64_t part = int64_t(blockIdx.x) / own_blocks, batch = part / s.chunks;
  const int64_t begin = part % s.chunks * s.chunk, end = min_of(begin + s.chunk, s.other_count);
  const T* const grad = static_cast<const T*>(s.grad) + batch * s.grad_batch_stride;
  const bool owners_are_neighbours = s.grad_own_stride <= s.grad_other_stride;

  Box<V> mine;
  if (own < s.own_count) {
    V c[4];
    load_coordinates<scalar_t>(s.own, batch * s.own_stride[0] + own * s.own_stride[1], s.own_stride[2], c);
    mine = prepare_box<kKind>(s.format, c, constants);
  }
  V sums[grad_fields_of(kKind)] = {};
  for (int64_t first = begin; first < end; first += kOthers) {
    const int count = int(min_of(end - first, int64_t(kOthers)));
    __syncthreads();
    if (int(threadIdx.x) < count) {
      V c[4];
      load_coordinates<scalar_t>(s.other, batch * s.other_stride[0] + (first + threadIdx.x) * s.other_stride[1],
                                 s.other_stride[2], c);
      others[threadIdx.x] = prepare_box<kKind>(s.format, c, constants);
    }
    if (owners_are_neighbours) {
      for (int i = 0; own < s.own_count && i < count; ++i)
        grads[i][threadIdx.x] = grad[own * s.grad_own_stride + (first + i) * s.grad_other_stride];
    } else {
      const int lane = threadIdx.x % kWarpSize;
      for (int i = threadIdx.x / kWarpSize; lane < count && i < kOwners && first_own + i < s.own_count;
           i += kOwners / kWarpSize)
        grads[lane][i] = grad[(first_own + i) * s.grad_own_stride + (first + lane) * s.grad_other_stride];
    }
    __syncthreads();
    V recent[grad_fields_of(kKind)] = {};
    for (int i = 0; own < s.own_count && i < count; ++i) {
      const Box<V> other = others[i];
      BoxGrad<V> grad_mine, grad_other;
      Pair<kKind, false, V>(mine, other, constants)
          .gradient(mine, other, constants, V{grads[i][threadIdx.x]}, grad_mine, grad_other);
      each_field<kKind>(grad_mine, [&](int field, V value) { recent[field] = recent[field] + value; });
    }
#pragma unroll
    for (int field = 0; field < grad_fields_of(kKind); ++field) sums[field] = sums[field] + recent[field];
  }
  if (own >= s.own_count) return;
  T* const target = static_cast<T*>(s.sums) + part * grad_fields_of(kKind) * s.own_count + own;
#pragma unroll
  for (int field = 0; field < grad_fields_of(kKind); ++field) target[field * s.own_count] = sums[field].value;
}

// A thread owns one box, adds its chunks in order, and writes the gradient of the four numbers. One rounding.
template <typename scalar_t, Kind kKind>
__global__ void __launch_bounds__(kOwners) box_iou_finish_kernel(const __grid_constant__ Side s) {
  using T = opmath_t<scalar_t>;
  using V = Rounded<T>;
  const int64_t box = int64_t(blockIdx.x) * kOwners + threadIdx.x;
  if (box >= s.batches * s.own_count) return;
  const int64_t batch = box / s.own_count, own = box % s.own_count;
  CarefulSum<V> totals[grad_fields_of(kKind)];
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    const T* const from =
        static_cast<const T*>(s.sums) + (batch * s.chunks + chunk) * grad_fields_of(kKind) * s.own_count + own;
#pragma unroll
    for (int field = 0; field < grad_fields_of(kKind); ++field) totals[field].add(V{from[field * s.own_count]});
  }
  BoxGrad<V> sum;
  each_field<kKind>(sum, [&](int field, V& value) { value = totals[field].total(); });
  V c[4], out[4];
  load_coordinates<scalar_t>(s.own, batch * s.own_stride[0] + own * s.own_stride[1], s.own_stride[2], c);
  finish_gradient<kKind>(s.format, c, sum, constants_of<T>(0, s.eps, s.eps), out);
  scalar_t* const target = static_cast<scalar_t*>(s.target) + box * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) target[i] = from_opmath<scalar_t>(out[i].value);
}

unsigned checked_grid(int64_t blocks) {
  if (blocks > kMaxGrid)
    throw std::runtime_error("box_iou: expected boxes1 and boxes2 to need at most 2147483647 blocks, but got " +
                             std::to_string(blocks));
  return unsigned(blocks);
}

int64_t chunk_of(int64_t others) {
  return max_of(kChunk, ceil_div(ceil_div(others, kMaxChunks), int64_t(kOthers)) * kOthers);
}

Side make_side(const BoxIouParams& p, bool first) {
  Side s{};
  s.own = first ? p.boxes1 : p.boxes2;
  s.other = first ? p.boxes2 : p.boxes1;
  s.own_count = first ? p.N : p.M;
  s.other_count = first ? p.M : p.N;
  s.batches = p.B;
  s.chunk = chunk_of(s.other_count);
  s.chunks = ceil_div(s.other_count, s.chunk);
  for (int i = 0; i < 3; ++i) {
    s.own_stride[i] = first ? p.boxes1_stride[i] : p.boxes2_stride[i];
    s.other_stride[i] = first ? p.boxes2_stride[i] : p.boxes1_stride[i];
  }
  s.grad_batch_stride = p.grad_stride[0];
  s.grad_own_stride = p.grad_stride[first ? 1 : 2];
  s.grad_other_stride = p.grad_stride[first ? 2 : 1];
  s.grad = p.grad;
  s.sums = p.scratch;
  s.target = first ? p.grad1 : p.grad2;
  s.format = p.format;
  s.eps = p.eps;
  return s;
}

int64_t sum_bytes(const BoxIouParams& p, const Side& s) {
  if (s.target == nullptr) return 0;
  const int64_t width = p.dtype == DType::kFloat64 ? 8 : 4;
  return s.batches * s.chunks * grad_fields_of(p.kind) * s.own_count * width;
}

template <typename scalar_t, Kind kKind>
void backward_side(const Side& s, Stream stream) {
  if (s.target == nullptr) return;
  const int64_t blocks = ceil_div(s.own_count, int64_t(kOwners)) * s.chunks * s.batches;
  if (blocks > 0) {
    launch(box_iou_backward_kernel<scalar_t, kKind>, {dim3(checked_grid(blocks)), dim3(kOwners), 0, stream}, s);
  }
  const unsigned finish_blocks = checked_grid(ceil_div(s.batches * s.own_count, int64_t(kOwners)));
  launch(box_iou_finish_kernel<scalar_t, kKind>, {dim3(finish_blocks), dim3(kOwners), 0, stream}, s);
}

}  // namespace

void forward(const BoxIouParams& p, Stream stream) {
  if (p.B == 0 || p.N == 0 || p.M == 0) return;
  const int64_t blocks = p.B * ceil_div(p.N, int64_t(kRows)) * ceil_div(p.M, int64_t(kColumns * kWarpSize));
  const LaunchConfig config = {dim3(checked_grid(blocks)), dim3(kBlockThreads), 0, stream};
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    dispatch_kind(p.kind, [&]<Kind kKind>() { launch(box_iou_forward_kernel<scalar_t, kKind>, config, p); });
  });
}

// The two sides run one after the other and share it.
int64_t scratch_bytes(const BoxIouParams& p) {
  return max_of(sum_bytes(p, make_side(p, true)), sum_bytes(p, make_side(p, false)));
}

void backward(const BoxIouParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    dispatch_kind(p.kind, [&]<Kind kKind>() {
      backward_side<scalar_t, kKind>(make_side(p, true), stream);
      backward_side<scalar_t, kKind>(make_side(p, false), stream);
    });
  });
}

}  // namespace pvk::box_iou
