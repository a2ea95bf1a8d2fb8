// Softmax cross entropy on CUDA: the logits are read once forward, once backward, 16 bytes at a time where they allow.
//
// Classes that are neighbours ([N, S, C]): Threads own a position, each of them every Threads-th vector of its classes.
// Classes apart ([N, C, S]): a thread owns VEC neighbouring positions. Maximum and sum of exponentials go along
// together (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
#include "core/activation.cuh"
#include "core/dispatch.cuh"
#include "core/group_sum.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/softmax_cross_entropy/softmax_cross_entropy.h"

namespace pvk::softmax_cross_entropy {
namespace {

constexpr int kBlockThreads = 256;

template <typename T>
constexpr int kClassesAtOnce = 16 / int(sizeof(T));  // of planes

using Params = SoftmaxCrossEntropyParams;

PVK_DEVICE float log_of(float x) {
  return logf(x);
}
PVK_DEVICE double log_of(double x) {
  return log(x);
}

template <typename T>
PVK_DEVICE T infinity() {
  return T(__builtin_huge_val());
}

// The maximum of some logits, and the sum of exp(x - max). It begins with a finite one: to it, -infinity adds nothing.
template <typename T>
struct Online {
  T max = sizeof(T) == 8 ? T(-1.7976931348623157e308) : T(-3.402823466e38f), sum = 0;

  template <int N>
  PVK_DEVICE void add(const T (&x)[N]) {
    T larger = max;
#pragma unroll
    for (int i = 0; i < N; ++i) larger = x[i] > larger ? x[i] : larger;
    sum *= exp_of(max - larger);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp_of(x[i] - larger);
    max = larger;
  }
  PVK_DEVICE void merge(T other_max, T other_sum) {
    const T larger = other_max > max ? other_max : max;
    sum = sum * exp_of(max - larger) + other_sum * exp_of(other_max - larger);
    max = larger;
  }
};

// The sum over the Threads that own a position; every one of them gets it. The whole warp, or the whole block, calls.
template <int Threads, typename T>
PVK_DEVICE T sum_over(T value) {
  if constexpr (Threads >= kWarpSize) {
    T values[1] = {value};
    sum_of_group<Threads>(values);
    return values[0];
  } else {
#pragma unroll
    for (int mask = Threads / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
    return value;
  }
}

template <int Threads, typename T>
PVK_DEVICE void merge_over(Online<T>& online) {
  constexpr int kSpan = Threads < kWarpSize ? Threads : kWarpSize;
#pragma unroll
  for (int mask = kSpan / 2; mask > 0; mask /= 2) {
    const T max = shfl_xor(online.max, mask), sum = shfl_xor(online.sum, mask);
    online.merge(max, sum);
  }
  if constexpr (Threads > kWarpSize) {
    constexpr int kWarps = Threads / kWarpSize;
    SIMT_SHARED(T[2 * kWarps], parts);
    const int warp = threadIdx.x / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) {
      parts[2 * warp] = online.max;
      parts[2 * warp + 1] = online.sum;
    }
    __syncthreads();
    online = Online<T>();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) online.merge(parts[2 * w], parts[2 * w + 1]);
    __syncthreads();  // before they are written again
  }
}

template <typename T>
PVK_DEVICE T weight_of(const Params& p, int64_t c) {
  T weight[1];
  load_weights(p.weight, p.weight_dtype, c, T(1), weight);
  return weight[0];
}

// What a label asks for: q_c = scale * [c == label] + base * weight_c.
template <typename T>
struct Label {
  int64_t label = -1;
  T scale = 0, weight = 0;
  bool is_ignored = false;

  PVK_DEVICE Label() {}
  PVK_DEVICE Label(const Params& p, int64_t position) {
    label = __ldg(static_cast<const long long*>(p.target) + position);
    is_ignored = label == p.ignore_index;
    const bool is_class = label >= 0 && label < p.C;
    weight = is_ignored ? T(0) : is_class ? weight_of<T>(p, label) : infinity<T>() - infinity<T>();
    scale = T(1 - p.smoothing) * weight;
    if (is_ignored || !is_class) label = -1;
  }
};

template <typename T>
PVK_DEVICE T base_of(const Params& p, int64_t c) {
  return p.smoothing > 0 ? T(p.smoothing / double(p.C)) * weight_of<T>(p, c) : T(0);
}

template <typename T>
PVK_DEVICE T wanted_of(const Params& p, int64_t c, T probability) {
  return T(1 - p.smoothing) * weight_of<T>(p, c) * probability + base_of<T>(p, c);
}

template <typename scalar_t>
PVK_DEVICE opmath_t<scalar_t> load_one(const void* data, int64_t i) {
  return to_opmath(__ldg(static_cast<const scalar_t*>(data) + i));
}

template <typename scalar_t>
PVK_DEVICE void store_loss(const Params& p, int64_t i, opmath_t<scalar_t> value) {
  if (p.loss_dtype == p.dtype) {
    static_cast<scalar_t*>(p.loss)[i] = from_opmath<scalar_t>(value);
  } else {
    static_cast<opmath_t<scalar_t>*>(p.loss)[i] = value;
  }
}

template <typename scalar_t>
PVK_DEVICE opmath_t<scalar_t> grad_of(const Params& p, int64_t position) {
  using T = opmath_t<scalar_t>;
  const int64_t i = p.reduction == Reduction::kNone ? position : 0;
  const T grad = p.loss_dtype == p.dtype ? load_one<scalar_t>(p.grad, i) : load_one<T>(p.grad, i);
  return p.reduction == Reduction::kMean ? grad / static_cast<const T*>(p.stats)[2 * p.N * p.S] : grad;
}

// The end of a position's forward, by one thread: its statistics, its loss; `sums` are the thread's, of losses and
// weights. smooth: what probabilities or smoothing cost.
template <typename scalar_t, typename T>
PVK_DEVICE void finish(const Params& p, int64_t position, const Label<T>& label, T picked, T max, T log, T smooth,
                       double (&sums)[2]) {
  T* const stats = static_cast<T*>(p.stats);
  stats[position] = max;
  stats[p.N * p.S + position] = log;
  T loss = smooth;
  if (!p.is_soft) loss = label.is_ignored ? T(0) : smooth + label.scale * (log - (picked - max));
  if (p.reduction == Reduction::kNone) store_loss<scalar_t>(p, position, loss);
  sums[0] += double(loss);
  sums[1] += p.is_soft ? 1.0 : double(label.weight);
}

// partials[block] = the sums of the block's threads.
PVK_DEVICE void store_partials(const Params& p, double (&sums)[2]) {
  sum_of_group<kBlockThreads>(sums);
  if (threadIdx.x == 0) {
    p.partials[2 * int64_t(blockIdx.x)] = sums[0];
    p.partials[2 * int64_t(blockIdx.x) + 1] = sums[1];
  }
}

// Position of a thread's group in this round; beyond the last it repeats that, and stores nothing.
template <int Threads>
struct Row {
  static constexpr int kRowsOfBlock = kBlockThreads / Threads;
  int64_t position;
  bool is_there;

  PVK_DEVICE Row(int64_t first, int64_t positions) {
    position = first + threadIdx.x / Threads;
    is_there = position < positions;
    if (!is_there) position = positions - 1;
  }
};

template <typename scalar_t, int VEC, int Threads>
__global__ void __launch_bounds__(kBlockThreads, 2)
    softmax_cross_entropy_rows_kernel(const __grid_constant__ Params p) {
  using T = opmath_t<scalar_t>;
  constexpr int kRows = Row<Threads>::kRowsOfBlock;
  const int64_t positions = p.N * p.S, begin = int64_t(threadIdx.x % Threads) * VEC;
  const scalar_t *const input = static_cast<const scalar_t*>(p.input), *const target =
                                                                           static_cast<const scalar_t*>(p.target);
  double sums[2] = {};
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < positions; first += int64_t(gridDim.x) * kRows) {
    const Row<Threads> row(first, positions);
    const int64_t offset = row.position * p.C;
    Online<T> online;
    for (int64_t c = begin; c < p.C; c += Threads * VEC) {
      const auto x = load_vec<VEC>(input + offset + c);
      T values[VEC];
#pragma unroll
      for (int e = 0; e < VEC; ++e) values[e] = to_opmath(x.data[e]);
      online.add(values);
    }
    merge_over<Threads>(online);
    const T max = online.max, log = log_of(online.sum);
    double smooth = 0;  // chains of classes round in float
    if (p.is_soft || p.smoothing > 0) {
#pragma unroll 1
      for (int64_t c = begin; c < p.C; c += Threads * VEC) {
        const auto x = load_vec<VEC>(input + offset + c);
        VecN<scalar_t, VEC> t = {};
        if (p.is_soft) t = load_vec<VEC>(target + offset + c);
#pragma unroll
        for (int e = 0; e < VEC; ++e)
          smooth += double(wanted_of<T>(p, c + e, p.is_soft ? to_opmath(t.data[e]) : T(0)) *
                           (log - (to_opmath(x.data[e]) - max)));
      }
      smooth = sum_over<Threads>(smooth);
    }
    if (begin == 0 && row.is_there) {
      Label<T> label;
      if (!p.is_soft) label = Label<T>(p, row.position);
      const T picked = label.label < 0 ? T(0) : to_opmath(__ldg(input + offset + label.label));
      finish<scalar_t>(p, row.position, label, picked, max, log, T(smooth), sums);
    }
  }
  store_partials(p, sums);
}

template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    softmax_cross_entropy_planes_kernel(const __grid_constant__ Params p) {
  using T = opmath_t<scalar_t>;
  constexpr int kClasses = kClassesAtOnce<T>;
  const int64_t positions = p.N * p.S, step = int64_t(gridDim.x) * kBlockThreads * VEC;
  const scalar_t *const input = static_cast<const scalar_t*>(p.input), *const target =
                                                                           static_cast<const scalar_t*>(p.target);
  double sums[2] = {};
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < positions; i += step) {
    const int64_t offset = i / p.S * p.C * p.S + i % p.S;
    Online<T> online[VEC];
    for (int64_t c = 0; c < p.C; c += kClasses) {
      T values[VEC][kClasses];
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        const bool is_there = c + j < p.C;
        const auto x = load_vec<VEC>(input + offset + (is_there ? c + j : c) * p.S);
#pragma unroll
        for (int e = 0; e < VEC; ++e) values[e][j] = is_there ? to_opmath(x.data[e]) : -infinity<T>();
      }
#pragma unroll
      for (int e = 0; e < VEC; ++e) online[e].add(values[e]);
    }
    T log[VEC];
    double smooth[VEC] = {};
#pragma unroll
    for (int e = 0; e < VEC; ++e) log[e] = log_of(online[e].sum);
    if (p.is_soft || p.smoothing > 0) {
#pragma unroll 1
      for (int64_t c = 0; c < p.C; ++c) {
        const auto x = load_vec<VEC>(input + offset + c * p.S);
        VecN<scalar_t, VEC> t = {};
        if (p.is_soft) t = load_vec<VEC>(target + offset + c * p.S);
        const T scale = T(1 - p.smoothing) * weight_of<T>(p, c), base = base_of<T>(p, c);
#pragma unroll
        for (int e = 0; e < VEC; ++e)
          smooth[e] += double((p.is_soft ? scale * to_opmath(t.data[e]) + base : base) *
                              (log[e] - (to_opmath(x.data[e]) - online[e].max)));
      }
    }
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      Label<T> label;
      if (!p.is_soft) label = Label<T>(p, i + e);
      const T picked = label.label < 0 ? T(0) : to_opmath(__ldg(input + offset + e + label.label * p.S));
      finish<scalar_t>(p, i + e, label, picked, online[e].max, log[e], T(smooth[e]), sums);
    }
  }
  store_partials(p, sums);
}

// One block adds the parts in order of its threads.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    softmax_cross_entropy_total_kernel(const __grid_constant__ Params p, int parts) {
  using T = opmath_t<scalar_t>;
  double sums[2] = {};
  for (int i = threadIdx.x; i < parts; i += kBlockThreads) {
    sums[0] += p.partials[2 * i];
    sums[1] += p.partials[2 * i + 1];
  }
  sum_of_group<kBlockThreads>(sums);
  if (threadIdx.x != 0) return;
  static_cast<T*>(p.stats)[2 * p.N * p.S] = T(sums[1]);
  if (p.reduction == Reduction::kNone) return;
  store_loss<scalar_t>(p, 0, T(p.reduction == Reduction::kMean ? sums[0] / sums[1] : sums[0]));
}

// The sum of all base_c, what a label asks for beside its own class. The whole block calls it.
template <typename T>
PVK_DEVICE T base_sum_of(const Params& p) {
  if (!(p.smoothing > 0) || p.is_soft) return T(0);
  T sum[1] = {};
  for (int64_t c = threadIdx.x; c < p.C; c += kBlockThreads) sum[0] += base_of<T>(p, c);
  sum_of_group<kBlockThreads>(sum);
  return sum[0];
}

template <typename scalar_t, int VEC, int Threads>
__global__ void __launch_bounds__(kBlockThreads, 2)
    softmax_cross_entropy_backward_rows_kernel(const __grid_constant__ Params p) {
  using T = opmath_t<scalar_t>;
  constexpr int kRows = Row<Threads>::kRowsOfBlock;
  const int64_t positions = p.N * p.S, begin = int64_t(threadIdx.x % Threads) * VEC;
  const scalar_t *const input = static_cast<const scalar_t*>(p.input), *const target =
                                                                           static_cast<const scalar_t*>(p.target);
  const T* const stats = static_cast<const T*>(p.stats);
  const T base_sum = base_sum_of<T>(p);
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < positions; first += int64_t(gridDim.x) * kRows) {
    const Row<Threads> row(first, positions);
    const int64_t offset = row.position * p.C;
    const T max = __ldg(stats + row.position), log = __ldg(stats + positions + row.position);
    const T grad = grad_of<scalar_t>(p, row.position);
    Label<T> label;
    if (!p.is_soft) label = Label<T>(p, row.position);
    T total = label.scale + base_sum;
    if (p.is_soft) {
      total = T(0);
#pragma unroll 1
      for (int64_t c = begin; c < p.C; c += Threads * VEC) {
        const auto t = load_vec<VEC>(target + offset + c);
#pragma unroll
        for (int e = 0; e < VEC; ++e) total += wanted_of<T>(p, c + e, to_opmath(t.data[e]));
      }
      total = sum_over<Threads>(total);
    }
    if (!row.is_there) continue;
    for (int64_t c = begin; c < p.C; c += Threads * VEC) {
      const auto x = load_vec<VEC>(input + offset + c);
      VecN<scalar_t, VEC> t = {}, by_logit, by_target;
      if (p.is_soft) t = load_vec<VEC>(target + offset + c);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const T log_p = (to_opmath(x.data[e]) - max) - log;
        const T wanted = p.is_soft ? wanted_of<T>(p, c + e, to_opmath(t.data[e]))
                                   : base_of<T>(p, c + e) + (c + e == label.label ? label.scale : T(0));
        const T value = grad * (exp_of(log_p) * total - wanted);
        by_logit.data[e] = from_opmath<scalar_t>(label.is_ignored ? T(0) : value);
        if (p.grad_target != nullptr)
          by_target.data[e] = from_opmath<scalar_t>(-grad * T(1 - p.smoothing) * weight_of<T>(p, c + e) * log_p);
      }
      if (p.grad_input != nullptr) store_vec(static_cast<scalar_t*>(p.grad_input) + offset + c, by_logit);
      if (p.grad_target != nullptr) store_vec(static_cast<scalar_t*>(p.grad_target) + offset + c, by_target);
    }
  }
}

template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    softmax_cross_entropy_backward_planes_kernel(const __grid_constant__ Params p) {
  using T = opmath_t<scalar_t>;
  const int64_t positions = p.N * p.S, step = int64_t(gridDim.x) * kBlockThreads * VEC;
  const scalar_t *const input = static_cast<const scalar_t*>(p.input), *const target =
                                                                           static_cast<const scalar_t*>(p.target);
  const T* const stats = static_cast<const T*>(p.stats);
  const T base_sum = base_sum_of<T>(p);
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < positions; i += step) {
    const int64_t offset = i / p.S * p.C * p.S + i % p.S;
    T max[VEC], log[VEC], grad[VEC], total[VEC], scale[VEC];
    int label[VEC];
    bool is_ignored[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      max[e] = __ldg(stats + i + e);
      log[e] = __ldg(stats + positions + i + e);
      grad[e] = grad_of<scalar_t>(p, i + e);
      Label<T> found;
      if (!p.is_soft) found = Label<T>(p, i + e);
      label[e] = int(found.label);
      scale[e] = found.scale;
      is_ignored[e] = found.is_ignored;
      total[e] = found.scale + base_sum;
    }
    if (p.is_soft) {
#pragma unroll 1
      for (int64_t c = 0; c < p.C; ++c) {
        const auto t = load_vec<VEC>(target + offset + c * p.S);
        const T factor = T(1 - p.smoothing) * weight_of<T>(p, c), base = base_of<T>(p, c);
#pragma unroll
        for (int e = 0; e < VEC; ++e) total[e] += factor * to_opmath(t.data[e]) + base;
      }
    }
    for (int64_t c = 0; c < p.C; ++c) {
      const auto x = load_vec<VEC>(input + offset + c * p.S);
      VecN<scalar_t, VEC> t = {}, by_logit, by_target;
      if (p.is_soft) t = load_vec<VEC>(target + offset + c * p.S);
      const T base = base_of<T>(p, c), factor = p.is_soft ? T(1 - p.smoothing) * weight_of<T>(p, c) : T(0);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const T log_p = (to_opmath(x.data[e]) - max[e]) - log[e];
        const T wanted = base + (p.is_soft ? factor * to_opmath(t.data[e]) : int(c) == label[e] ? scale[e] : T(0));
        const T value = grad[e] * (exp_of(log_p) * total[e] - wanted);
        by_logit.data[e] = from_opmath<scalar_t>(is_ignored[e] ? T(0) : value);
        by_target.data[e] = from_opmath<scalar_t>(-grad[e] * factor * log_p);
      }
      if (p.grad_input != nullptr) store_vec(static_cast<scalar_t*>(p.grad_input) + offset + c * p.S, by_logit);
      if (p.grad_target != nullptr) store_vec(static_cast<scalar_t*>(p.grad_target) + offset + c * p.S, by_target);
    }
  }
}

// Whether vectors of a row, or of a plane, all begin at multiples of 16 bytes; nullptr does.
template <typename scalar_t>
bool allows_vectors(const Params& p) {
  const auto fits = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return (p.classes_last ? p.C : p.S) % kVec16<scalar_t> == 0 && fits(p.input) && (!p.is_soft || fits(p.target)) &&
         fits(p.grad_input) && fits(p.grad_target);
}

// body.operator()<VEC, Threads>(); Threads is 0 for planes.
template <typename scalar_t, typename Body>
void dispatch_layout(const Params& p, const Body& body) {
  constexpr int kVec = kVec16<scalar_t>;
  const auto by_threads = [&]<int VEC>() {
    if (!p.classes_last) return body.template operator()<VEC, 0>();
    if (p.C <= 32 * VEC) return body.template operator()<VEC, 8>();
    if (p.C <= 1024 * VEC) return body.template operator()<VEC, 32>();
    return body.template operator()<VEC, kBlockThreads>();
  };
  if (allows_vectors<scalar_t>(p)) return by_threads.template operator()<kVec>();
  by_threads.template operator()<1>();
}

template <int VEC, int Threads>
dim3 grid_of(const Params& p) {
  constexpr int64_t kOfBlock = Threads == 0 ? kBlockThreads * VEC : kBlockThreads / max_of(Threads, 1);
  return dim3(unsigned(min_of(ceil_div(p.N * p.S, kOfBlock), kParts)));
}

}  // namespace

int64_t forward(const Params& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    int parts = 0;
    if (p.N * p.S > 0) {
      dispatch_layout<scalar_t>(p, [&]<int VEC, int Threads>() {
        const dim3 grid = grid_of<VEC, Threads>(p);
        parts = int(grid.x);
        if constexpr (Threads == 0) {
          launch(softmax_cross_entropy_planes_kernel<scalar_t, VEC>, {grid, dim3(kBlockThreads), 0, stream}, p);
        } else {
          launch(softmax_cross_entropy_rows_kernel<scalar_t, VEC, Threads>, {grid, dim3(kBlockThreads), 0, stream}, p);
        }
      });
    }
    launch(softmax_cross_entropy_total_kernel<scalar_t>, {dim3(1), dim3(kBlockThreads), 0, stream}, p, parts);
  });
  return -1;
}

void backward(const Params& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    dispatch_layout<scalar_t>(p, [&]<int VEC, int Threads>() {
      const dim3 grid = grid_of<VEC, Threads>(p);
      if constexpr (Threads == 0) {
        launch(softmax_cross_entropy_backward_planes_kernel<scalar_t, VEC>, {grid, dim3(kBlockThreads), 0, stream}, p);
      } else {
        launch(softmax_cross_entropy_backward_rows_kernel<scalar_t, VEC, Threads>,
               {grid, dim3(kBlockThreads), 0, stream}, p);
      }
    });
  });
}

}  // namespace pvk::softmax_cross_entropy
