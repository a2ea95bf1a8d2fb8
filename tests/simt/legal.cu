// Kernels that are right, though a careless detector would accuse them: under every schedule they run without a
// complaint. Each gets an array of n = 64 zeros.
#include "core/async.cuh"
#include "core/cluster.cuh"
#include "selftest.cuh"

namespace selftest {
namespace {

using namespace pvk;

#define LEGAL(name, config)                     \
  }                                             \
  SELFTEST legal_##name() {                     \
    return run_on_zeros(name##_kernel, config); \
  }                                             \
  namespace {

__global__ void cleared_by_memset_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  if (i == 0) memset(shared, 0, sizeof(shared));
  __syncthreads();
  data[i] = shared[n - 1 - i];
}
LEGAL(cleared_by_memset, threads(64))

struct Point {
  float x, y, z;
};
__global__ void copied_by_memcpy_kernel(float* data, int n) {
  SIMT_SHARED(Point[kCount], shared);
  const int i = threadIdx.x;
  const Point point = {data[i], 1.0f, 2.0f};
  memcpy(&shared[i], &point, sizeof(point));
  __syncthreads();
  data[i] = shared[n - 1 - i].z;
}
LEGAL(copied_by_memcpy, threads(64))

struct Flagged {
  char flag;
  float value;
};
__global__ void padding_kernel(float* data, int n) {
  SIMT_SHARED(Flagged[kCount], from);
  SIMT_SHARED(Flagged[kCount], to);
  const int i = threadIdx.x;
  from[i].flag = 1;
  from[i].value = data[i];
  __syncthreads();
  to[i] = from[n - 1 - i];
  data[i] = to[i].value;
}
LEGAL(padding, threads(64))

// A volatile store, and an exchange whose result nobody uses, may come first.
__global__ void first_writes_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  SIMT_SHARED(unsigned, flag);
  volatile float* const values = shared;
  const int i = threadIdx.x;
  values[i] = data[i];
  if (i == 0) atomicExch(&flag, 1u);
  __syncthreads();
  data[i] = values[n - 1 - i] + float(flag);
}
LEGAL(first_writes, threads(64))

// Atomics that go on changing memory are no livelock.
__global__ void many_atomics_kernel(float* data, int) {
  unsigned* const counts = reinterpret_cast<unsigned*>(data);
  for (int k = 0; k < 6000; ++k) atomicAdd(&counts[threadIdx.x % 7], 1u);
}
LEGAL(many_atomics, threads(1024))

// A barrier counts a warp's missing and exited lanes with the others.
__global__ void shorter_warp_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  if (i >= 44) return;
  shared[i] = data[i];
  __syncwarp(i < 32 ? kFullWarp : 0xfffu);
  barrier_sync(1, 64);
  data[i] = shared[43 - i];
}
LEGAL(shorter_warp, threads(48))

__global__ void warp_without_all_lanes_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = data[i];
  sync_warp();
  data[i] = shared[i ^ 1] + float(n);
}
LEGAL(warp_without_all_lanes, threads(48))

__global__ void bytes_of_a_word_kernel(float* data, int) {
  SIMT_SHARED(unsigned[kCount / 4], words);
  const int i = threadIdx.x;
  reinterpret_cast<unsigned char*>(words)[i] = static_cast<unsigned char>(i);
  __syncthreads();
  data[i] = float(words[i / 4]);
}
LEGAL(bytes_of_a_word, threads(64))

// Each thread waits for its own arrival's phase later than it might.
__global__ void split_cluster_barrier_kernel(float* data, int) {
  for (int k = 0; k < 3; ++k) {
    cluster_arrive();
    data[threadIdx.x + 32 * cluster_rank()] += 1.0f;
    cluster_wait();
  }
}
LEGAL(split_cluster_barrier, (LaunchConfig{dim3(2), dim3(32), 0, nullptr, 2}))

}  // namespace
}  // namespace selftest
