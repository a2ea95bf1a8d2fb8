// Kernels that are wrong, each in one way. The emulator must stop every one, whatever the schedule, and say where:
// test_kernels.py finds the lines by the comments `line: <kernel> <what>`. All get an array of n = 64 zeros and, where
// nothing else is said, run as one block of 64 threads.
#include "core/async.cuh"
#include "core/cluster.cuh"
#include "core/mma.cuh"
#include "selftest.cuh"

namespace selftest {
namespace {

using namespace pvk;

#define WRONG(name, config)                     \
  }                                             \
  SELFTEST wrong_##name() {                     \
    return run_on_zeros(name##_kernel, config); \
  }                                             \
  namespace {

// ---- races on shared memory ----

__global__ void missing_barrier_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = 0.0f;
  __syncthreads();
  shared[i] = data[i];           // line: missing_barrier write
  data[i] += shared[n - 1 - i];  // line: missing_barrier read
}
WRONG(missing_barrier, threads(64))

// Whether this is a race or a read of what nobody has written is up to the schedule.
__global__ void missing_first_barrier_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = data[i];
  data[i] += shared[n - 1 - i];  // line: missing_first_barrier read
}
WRONG(missing_first_barrier, threads(64))

// The tile is overwritten while other threads still read it.
__global__ void write_after_read_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  for (int step = 0; step < 2; ++step) {
    shared[i] = data[i] + float(step);  // line: write_after_read write
    __syncthreads();
    data[i] += shared[n - 1 - i];  // line: write_after_read read
  }
}
WRONG(write_after_read, threads(64))

__global__ void missing_syncwarp_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = 0.0f;
  sync_warp();
  shared[i] = data[i];       // line: missing_syncwarp write
  data[i] += shared[i ^ 1];  // line: missing_syncwarp read
}
WRONG(missing_syncwarp, threads(32))

// A shuffle is no barrier for memory.
__global__ void shuffle_for_syncwarp_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = data[i];  // line: shuffle_for_syncwarp write
  const float other = shfl_xor(data[i], 1);
  data[i] += other + shared[i ^ 1];  // line: shuffle_for_syncwarp read
}
WRONG(shuffle_for_syncwarp, threads(32))

// __syncwarp of the lower half does not order the upper half's accesses.
__global__ void partial_syncwarp_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = data[i];  // line: partial_syncwarp write
  sync_warp(i < 16 ? 0x0000ffffu : 0xffff0000u);
  data[i] += shared[31 - i];  // line: partial_syncwarp read
}
WRONG(partial_syncwarp, threads(32))

__global__ void two_writers_kernel(float* data, int) {
  SIMT_SHARED(float, last);
  last = data[threadIdx.x];  // line: two_writers write
  __syncthreads();
  data[threadIdx.x] = last;
}
WRONG(two_writers, threads(64))

__global__ void atomic_and_write_kernel(float* data, int) {
  SIMT_SHARED(unsigned, count);
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (threadIdx.x == 32) {
    count = 7;  // line: atomic_and_write write
  } else {
    atomicAdd(&count, 1u);  // line: atomic_and_write atomic
  }
  __syncthreads();
  data[threadIdx.x] = float(count);
}
WRONG(atomic_and_write, threads(64))

// The thread that clears the count adds to it first, but not for the others.
__global__ void atomic_after_own_write_kernel(float* data, int) {
  SIMT_SHARED(unsigned, count);
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (threadIdx.x == 0) count = 1;  // line: atomic_after_own_write write
  atomicAdd(&count, 1u);            // line: atomic_after_own_write atomic
  __syncthreads();
  data[threadIdx.x] = float(count);
}
WRONG(atomic_after_own_write, threads(64))

// The second atomic must not make the first one forgotten.
__global__ void read_after_atomics_kernel(float* data, int) {
  SIMT_SHARED(int, sum);
  const int i = threadIdx.x;
  if (i == 0) sum = 0;
  __syncthreads();
  if (i == 0 || i == 32) atomicAdd(&sum, 1);
  if (i == 32) data[i] = float(sum);  // line: read_after_atomics read
}
WRONG(read_after_atomics, threads(64))

// With races looked for on global memory: blocks are not ordered.
__global__ void global_race_kernel(float* data, int n) {
  if (blockIdx.x == 0) data[threadIdx.x] = 1.0f;           // line: global_race write
  if (blockIdx.x == 1) data[n - 1 - threadIdx.x] += 2.0f;  // line: global_race update
}
WRONG(global_race, blocks(2))

__global__ void missing_grid_sync_kernel(float* data, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  data[i] = 1.0f;              // line: missing_grid_sync write
  data[i] += data[n - 1 - i];  // line: missing_grid_sync read
}
WRONG(missing_grid_sync, cooperative(2, 32))

// The flag may be seen before the data.
__global__ void missing_fence_kernel(float* data, int) {
  unsigned* const flag = reinterpret_cast<unsigned*>(data);
  if (blockIdx.x == 0) {
    data[1] = 1.0f;  // line: missing_fence write
    atomicExch(flag, 1u);
  } else {
    while (load_relaxed(flag) == 0) {}
    data[2] = data[1];  // line: missing_fence read
  }
}
WRONG(missing_fence, cooperative(2, 1))

// ---- barriers ----

__global__ void divergent_barrier_kernel(float* data, int) {
  if (threadIdx.x < 16) {
    __syncthreads();  // line: divergent_barrier lower
    data[threadIdx.x] = 1.0f;
  } else {
    __syncthreads();  // line: divergent_barrier upper
  }
}
WRONG(divergent_barrier, threads(64))

__global__ void deadlock_kernel(float* data, int) {
  SIMT_SHARED(MBarrier, ready);
  if (threadIdx.x == 0) ready.init(1);
  __syncthreads();
  if (threadIdx.x < 32) {
    ready.wait(0);  // line: deadlock wait
  } else {
    __syncthreads();  // line: deadlock barrier
  }
  data[threadIdx.x] = 1.0f;
}
WRONG(deadlock, threads(64))

__global__ void endless_spin_kernel(float* data, int) {
  while (load_relaxed(reinterpret_cast<const unsigned*>(data)) == 0) {}
}
WRONG(endless_spin, threads(32))

__global__ void few_at_named_barrier_kernel(float* data, int) {
  barrier_sync(1, 96);  // line: few_at_named_barrier sync
  data[threadIdx.x] = 1.0f;
}
WRONG(few_at_named_barrier, threads(64))

__global__ void odd_named_barrier_kernel(float*, int) {
  barrier_sync(1, 40);  // line: odd_named_barrier sync
}
WRONG(odd_named_barrier, threads(64))

__global__ void divergent_named_barrier_kernel(float* data, int) {
  if (threadIdx.x < 16) {
    barrier_sync(1, 64);  // line: divergent_named_barrier lower
    data[threadIdx.x] = 1.0f;
  } else {
    barrier_sync(1, 64);  // line: divergent_named_barrier upper
  }
}
WRONG(divergent_named_barrier, threads(64))

// A barrier counts whole warps: to a device these are 64 threads.
__global__ void half_warps_at_named_barrier_kernel(float*, int) {
  if (threadIdx.x % 32 < 16) barrier_sync(1, 32);  // line: half_warps_at_named_barrier sync
  __syncthreads();
}
WRONG(half_warps_at_named_barrier, threads(64))

__global__ void barrier_16_kernel(float*, int) {
  barrier_sync(16, 64);  // line: barrier_16 sync
}
WRONG(barrier_16, threads(64))

__global__ void two_counts_of_named_barrier_kernel(float*, int) {
  if (threadIdx.x < 32) {
    barrier_arrive(1, 64);  // line: two_counts_of_named_barrier arrive
  } else {
    barrier_sync(1, 96);  // line: two_counts_of_named_barrier sync
  }
}
WRONG(two_counts_of_named_barrier, threads(64))

// ---- warps ----

__global__ void lane_missing_kernel(float* data, int) {
  const int i = threadIdx.x;
  if (i != 31) data[i] = shfl_xor(data[i], 1);  // line: lane_missing shuffle
  __syncthreads();                              // line: lane_missing barrier
}
WRONG(lane_missing, threads(64))

__global__ void exited_lane_kernel(float* data, int) {
  const int i = threadIdx.x;
  if (i == 5) return;
  data[i] = shfl_xor(data[i], 1);  // line: exited_lane shuffle
}
WRONG(exited_lane, threads(32))

__global__ void two_sites_kernel(float* data, int) {
  const int i = threadIdx.x;
  if (i < 16) {
    data[i] = shfl_xor(data[i], 1);  // line: two_sites lower
  } else {
    data[i] = shfl_xor(data[i], 1);  // line: two_sites upper
  }
}
WRONG(two_sites, threads(32))

__global__ void two_masks_kernel(float* data, int) {
  const int i = threadIdx.x;
  const unsigned mask = i < 16 ? 0x0000ffffu : kFullWarp;
  data[i] = float(__ballot_sync(mask, 1));  // line: two_masks ballot
}
WRONG(two_masks, threads(32))

__global__ void lane_outside_mask_kernel(float* data, int) {
  const int i = threadIdx.x;
  if (i < 16) data[i] = __shfl_sync(0x0000ffffu, data[i], i + 1);  // line: lane_outside_mask shuffle
}
WRONG(lane_outside_mask, threads(32))

__global__ void caller_outside_mask_kernel(float* data, int) {
  data[threadIdx.x] = float(__ballot_sync(0x0000ffffu, 1));  // line: caller_outside_mask ballot
}
WRONG(caller_outside_mask, threads(32))

__global__ void half_warp_kernel(float* data, int) {
  data[threadIdx.x] = float(pvk::ballot(true));  // line: half_warp ballot
}
WRONG(half_warp, threads(16))

// ---- cp.async ----

__global__ void read_before_wait_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  cp_async<4>(&shared[i], data + i);  // line: read_before_wait copy
  cp_async_commit();
  data[i] = shared[i];  // line: read_before_wait read
  cp_async_wait<0>();
}
WRONG(read_before_wait, threads(64))

// Nothing was committed, so that there is no group to wait for.
__global__ void missing_commit_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  cp_async<4>(&shared[i], data + i);  // line: missing_commit copy
  cp_async_wait<0>();
  data[i] = shared[i];  // line: missing_commit read
}
WRONG(missing_commit, threads(64))

// Waits for all groups but the one that it reads.
__global__ void short_wait_kernel(float* data, int) {
  SIMT_SHARED(float[2][kCount], shared);
  const int i = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    cp_async<4>(&shared[stage][i], data + i);  // line: short_wait copy
    cp_async_commit();
  }
  cp_async_wait<1>();
  data[i] = shared[1][i];  // line: short_wait read
  cp_async_wait<0>();
}
WRONG(short_wait, threads(64))

// A thread's wait is not the others'.
__global__ void wait_without_barrier_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = 0.0f;
  __syncthreads();
  cp_async<4>(&shared[i], data + i);  // line: wait_without_barrier copy
  cp_async_wait_all();
  data[i] = shared[n - 1 - i];  // line: wait_without_barrier read
}
WRONG(wait_without_barrier, threads(64))

// The next copy overwrites what other threads still read.
__global__ void copy_over_readers_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int step = 0; step < 2; ++step) {
    cp_async<4>(&shared[i], data + i);  // line: copy_over_readers copy
    cp_async_wait_all();
    __syncthreads();
    sum += shared[n - 1 - i];  // line: copy_over_readers read
  }
  data[i] = sum;
}
WRONG(copy_over_readers, threads(64))

__global__ void exit_with_copies_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  cp_async<4>(&shared[threadIdx.x], data + threadIdx.x);  // line: exit_with_copies copy
  cp_async_commit();
}
WRONG(exit_with_copies, threads(64))

__global__ void copy_from_shared_kernel(float*, int) {
  SIMT_SHARED(float4[2], shared);
  shared[0] = {};
  cp_async<16>(&shared[1], &shared[0]);  // line: copy_from_shared copy
}
WRONG(copy_from_shared, threads(1))

__global__ void unaligned_copy_kernel(float* data, int) {
  SIMT_SHARED(float4[kCount], shared);
  cp_async<16>(&shared[threadIdx.x], data + 1);  // line: unaligned_copy copy
  cp_async_wait_all();
}
WRONG(unaligned_copy, threads(32))

// The last vector needs source_bytes.
__global__ void copy_past_the_end_kernel(float* data, int n) {
  SIMT_SHARED(float4[kCount], shared);
  cp_async<16>(&shared[threadIdx.x], data + n - 4 + threadIdx.x * 4);  // line: copy_past_the_end copy
  cp_async_wait_all();
}
WRONG(copy_past_the_end, threads(2))

// ---- bounds, initialisation, alignment ----

__global__ void shared_read_out_of_bounds_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  shared[threadIdx.x] = 1.0f;
  __syncthreads();
  data[threadIdx.x] = (&shared[0])[threadIdx.x + n];  // line: shared_read_out_of_bounds read
}
WRONG(shared_read_out_of_bounds, threads(64))

__global__ void shared_write_out_of_bounds_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  (&shared[0])[n * threadIdx.x] = data[threadIdx.x];  // line: shared_write_out_of_bounds write
}
WRONG(shared_write_out_of_bounds, threads(2))

__global__ void dynamic_shared_out_of_bounds_kernel(float* data, int) {
  SIMT_DYN_SHARED(float, shared);
  shared[threadIdx.x] = data[threadIdx.x];  // line: dynamic_shared_out_of_bounds write
}
WRONG(dynamic_shared_out_of_bounds, dynamic_shared(60 * sizeof(float)))

__global__ void uninitialised_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  data[threadIdx.x] = shared[threadIdx.x];  // line: uninitialised read
}
WRONG(uninitialised, threads(64))

// Shared memory does not live from one block to the next.
__global__ void uninitialised_in_next_block_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  const bool is_first = atomicAdd(&data[i], 1.0f) == 0.0f;
  if (is_first) shared[i] = 1.0f;
  __syncthreads();
  if (!is_first) data[i] = shared[i];  // line: uninitialised_in_next_block read
}
WRONG(uninitialised_in_next_block, blocks(2))

__global__ void global_read_out_of_bounds_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  shared[threadIdx.x] = data[threadIdx.x + 1];  // line: global_read_out_of_bounds read
}
WRONG(global_read_out_of_bounds, threads(64))

__global__ void global_write_out_of_bounds_kernel(float* data, int) {
  data[threadIdx.x + 1] = 1.0f;  // line: global_write_out_of_bounds write
}
WRONG(global_write_out_of_bounds, threads(64))

__global__ void atomic_out_of_bounds_kernel(float* data, int n) {
  atomicAdd(&data[n], 1.0f);  // line: atomic_out_of_bounds atomic
}
WRONG(atomic_out_of_bounds, threads(1))

__global__ void memset_out_of_bounds_kernel(float* data, int n) {
  memset(data, 0, (n + 1) * sizeof(float));  // line: memset_out_of_bounds clear
}
WRONG(memset_out_of_bounds, threads(1))

__global__ void memcpy_out_of_bounds_kernel(float* data, int n) {
  float local[3];
  memcpy(local, data + n - 2, sizeof(local));  // line: memcpy_out_of_bounds copy
  data[0] = local[0] + local[2];
}
WRONG(memcpy_out_of_bounds, threads(1))

// A struct that is passed by value is read by the call.
struct Corners {
  float x1, y1, x2, y2;
};
__device__ float area_of(Corners box) {
  float sum = 0.0f;
  for (int i = 0; i < int(box.x2 - box.x1); ++i) sum += box.y2 - box.y1;
  return sum;
}
__global__ void value_out_of_bounds_kernel(float* data, int n) {
  const Corners* const boxes = reinterpret_cast<const Corners*>(data);
  data[0] = area_of(boxes[n / 4]) + area_of(boxes[n / 4 - 1]);
}
WRONG(value_out_of_bounds, threads(1))

__global__ void null_pointer_kernel(float* data, int n) {
  const float* const nowhere = n == kCount ? nullptr : data;
  data[0] = *nowhere;  // line: null_pointer read
}
WRONG(null_pointer, threads(1))

__global__ void others_local_kernel(float* data, int) {
  SIMT_SHARED(float*, pointer);
  float mine[2] = {data[0], data[1]};
  if (threadIdx.x == 0) pointer = mine;
  __syncthreads();
  data[threadIdx.x] = pointer[threadIdx.x % 2];  // line: others_local read
  __syncthreads();
}
WRONG(others_local, threads(64))

// Legal on a device; the emulator's stacks are smaller than a device's local memory.
__global__ void large_local_kernel(float* data, int n) {
  volatile float local[20000];
  for (int i = 0; i < n; ++i) local[i * 100] = data[i];
  data[threadIdx.x] = local[threadIdx.x];
}
WRONG(large_local, threads(64))

__global__ void unaligned_vector_kernel(float* data, int n) {
  const float4* const vector = reinterpret_cast<const float4*>(data + n / kCount);
  data[0] = vector->x + vector->w;  // line: unaligned_vector word
  data[1] = __ldg(vector).x;        // line: unaligned_vector read
}
WRONG(unaligned_vector, threads(1))

__global__ void unaligned_shared_vector_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  float2* const vector = reinterpret_cast<float2*>(&shared[n / kCount]);
  *vector = make_float2(data[0], data[1]);  // line: unaligned_shared_vector write
}
WRONG(unaligned_shared_vector, threads(1))

__global__ void unaligned_ldmatrix_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  shared[threadIdx.x] = shared[threadIdx.x + 32] = 0.0f;
  sync_warp();
  uint32_t regs[1];
  ldmatrix(regs, &shared[threadIdx.x % 8 * 4 + n / kCount]);  // line: unaligned_ldmatrix load
  data[threadIdx.x] = float(regs[0]);
}
WRONG(unaligned_ldmatrix, threads(32))

__global__ void ldmatrix_from_global_kernel(float* data, int) {
  uint32_t regs[1];
  ldmatrix(regs, data);
  data[threadIdx.x] = float(regs[0]);
}
WRONG(ldmatrix_from_global, threads(32))

__global__ void ldmatrix_without_barrier_kernel(float* data, int) {
  SIMT_SHARED(uint4[8], shared);
  uint32_t regs[1];
  const int row = threadIdx.x % 8;
  if (threadIdx.x < 8) shared[row] = uint4{};
  sync_warp();
  if (threadIdx.x < 8) shared[row] = uint4{1, 1, 1, 1};  // line: ldmatrix_without_barrier write
  ldmatrix(regs, &shared[7 - row]);                      // line: ldmatrix_without_barrier load
  data[threadIdx.x] = float(regs[0]);
}
WRONG(ldmatrix_without_barrier, threads(32))

__global__ void mma_lane_missing_kernel(float* data, int) {
  const MmaA a = {};
  const MmaB b = {};
  MmaC c = {};
  if (threadIdx.x == 7) return;
  mma_m16n8k16<__half>(c, a, b);  // line: mma_lane_missing mma
  data[threadIdx.x] = c.values[0];
}
WRONG(mma_lane_missing, threads(32))

// ---- mbarriers ----

__global__ void double_arrival_kernel(float* data, int) {
  SIMT_SHARED(MBarrier, barrier);
  if (threadIdx.x == 0) barrier.init(64);
  __syncthreads();
  barrier.arrive();
  if (threadIdx.x == 3) barrier.arrive();  // line: double_arrival arrive
  barrier.wait(0);
  data[threadIdx.x] = 1.0f;
}
WRONG(double_arrival, threads(64))

__global__ void too_many_arrivals_kernel(float*, int) {
  SIMT_SHARED(MBarrier, barrier);
  if (threadIdx.x == 0) barrier.init(16);
  __syncthreads();
  if (threadIdx.x == 0) barrier.arrive(17);  // line: too_many_arrivals arrive
}
WRONG(too_many_arrivals, threads(64))

__global__ void uninitialised_mbarrier_kernel(float* data, int) {
  SIMT_SHARED(MBarrier, barrier);
  barrier.arrive();  // line: uninitialised_mbarrier arrive
  barrier.wait(0);
  data[threadIdx.x] = 1.0f;
}
WRONG(uninitialised_mbarrier, threads(64))

// The barrier was made, but nothing tells the others so.
__global__ void mbarrier_init_without_barrier_kernel(float* data, int) {
  SIMT_SHARED(MBarrier, barrier);
  if (threadIdx.x == 0) barrier.init(64);  // line: mbarrier_init_without_barrier init
  barrier.arrive();                        // line: mbarrier_init_without_barrier arrive
  data[threadIdx.x] = 1.0f;
}
WRONG(mbarrier_init_without_barrier, threads(64))

__global__ void store_to_mbarrier_kernel(float*, int) {
  SIMT_SHARED(MBarrier, barrier);
  if (threadIdx.x != 0) return;
  barrier.init(1);
  barrier.word = 0;  // line: store_to_mbarrier store
}
WRONG(store_to_mbarrier, threads(64))

__global__ void twice_initialised_mbarrier_kernel(float*, int) {
  SIMT_SHARED(MBarrier, barrier);
  barrier.init(1);
  barrier.init(2);  // line: twice_initialised_mbarrier init
}
WRONG(twice_initialised_mbarrier, threads(1))

__global__ void invalidated_mbarrier_kernel(float*, int) {
  SIMT_SHARED(MBarrier, barrier);
  barrier.init(1);
  barrier.invalidate();
  barrier.arrive();  // line: invalidated_mbarrier arrive
}
WRONG(invalidated_mbarrier, threads(1))

__global__ void mbarrier_in_global_memory_kernel(float* data, int) {
  reinterpret_cast<MBarrier*>(data)->init(1);  // line: mbarrier_in_global_memory init
}
WRONG(mbarrier_in_global_memory, threads(1))

// What is full is not there yet.
__global__ void arrive_before_wait_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  SIMT_SHARED(MBarrier, full);
  if (threadIdx.x == 0) full.init(1);
  __syncthreads();
  if (threadIdx.x == 0) {
    cp_async<4>(&shared[0], data);  // line: arrive_before_wait copy
    full.arrive();
    cp_async_wait_all();
  } else {
    full.wait(0);
    data[threadIdx.x] = shared[0];  // line: arrive_before_wait read
  }
}
WRONG(arrive_before_wait, threads(33))

// A producer that does not wait until its slot is free again.
__global__ void overrun_slot_kernel(float* data, int) {
  SIMT_SHARED(float, slot);
  SIMT_SHARED(MBarrier, full);
  if (threadIdx.x == 0) full.init(1);
  __syncthreads();
  if (threadIdx.x == 0) {
    slot = data[0];
    full.arrive();
    slot = data[1];  // line: overrun_slot write
  } else {
    full.wait(0);
    data[1] = slot;  // line: overrun_slot read
  }
}
WRONG(overrun_slot, threads(2))

// Waits for the phase before the first one, which is over: reads what is not there yet.
__global__ void wrong_parity_kernel(float* data, int n) {
  SIMT_SHARED(float[kCount], shared);
  SIMT_SHARED(MBarrier, full);
  const int i = threadIdx.x;
  if (i == 0) full.init(kCount);
  shared[i] = 0.0f;
  __syncthreads();
  shared[i] = data[i];  // line: wrong_parity write
  full.arrive();
  full.wait(1);
  data[i] = shared[n - 1 - i];  // line: wrong_parity read
}
WRONG(wrong_parity, threads(64))

// ---- clusters and grids ----

__global__ void missing_cluster_barrier_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = data[i];  // line: missing_cluster_barrier write
  __syncthreads();
  const float other = *map_shared(&shared[i], cluster_rank() ^ 1);  // line: missing_cluster_barrier read
  cluster_sync();
  data[i] = other;
}
WRONG(missing_cluster_barrier, clusters(2, 2))

// Block 1 may have gone when block 0 reads its shared memory.
__global__ void exited_block_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  const int i = threadIdx.x;
  shared[i] = data[i];
  cluster_sync();
  if (cluster_rank() == 1) return;       // line: exited_block exit
  data[i] = *map_shared(&shared[i], 1);  // line: exited_block read
}
WRONG(exited_block, clusters(2, 2))

__global__ void rank_out_of_range_kernel(float* data, int) {
  SIMT_SHARED(float[kCount], shared);
  shared[threadIdx.x] = 0.0f;
  cluster_sync();
  data[threadIdx.x] = *map_shared(&shared[threadIdx.x], cluster_size());  // line: rank_out_of_range map
}
WRONG(rank_out_of_range, clusters(2, 2))

// A thread may arrive at another block's mbarrier, but not wait at it.
__global__ void remote_wait_kernel(float* data, int) {
  SIMT_SHARED(MBarrier, barrier);
  if (threadIdx.x == 0) {
    barrier.init(1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (threadIdx.x == 0) barrier.arrive();
  map_shared(&barrier, cluster_rank() ^ 1)->wait_cluster(0);  // line: remote_wait wait
  cluster_sync();
  data[threadIdx.x] = 1.0f;
}
WRONG(remote_wait, clusters(2, 2))

// The barrier was made, but nothing tells the other block so.
__global__ void early_remote_arrival_kernel(float*, int) {
  SIMT_SHARED(MBarrier, barrier);
  if (threadIdx.x == 0 && cluster_rank() == 0) barrier.init(1);
  if (threadIdx.x == 0 && cluster_rank() == 1)
    arrive_cluster(map_shared(&barrier, 0));  // line: early_remote_arrival arrive
  cluster_sync();
}
WRONG(early_remote_arrival, clusters(2, 2))

__global__ void divergent_cluster_barrier_kernel(float* data, int) {
  if (threadIdx.x < 16) {
    cluster_sync();  // line: divergent_cluster_barrier lower
    data[threadIdx.x] = 1.0f;
  } else {
    cluster_sync();  // line: divergent_cluster_barrier upper
  }
}
WRONG(divergent_cluster_barrier, clusters(2, 2))

__global__ void two_cluster_arrivals_kernel(float*, int) {
  cluster_arrive();
  cluster_arrive();  // line: two_cluster_arrivals arrive
  cluster_wait();
}
WRONG(two_cluster_arrivals, clusters(2, 2))

__global__ void wait_without_arrival_kernel(float*, int) {
  cluster_wait();  // line: wait_without_arrival wait
}
WRONG(wait_without_arrival, clusters(2, 2))

__global__ void second_cluster_wait_kernel(float*, int) {
  cluster_sync();
  cluster_wait();  // line: second_cluster_wait wait
}
WRONG(second_cluster_wait, clusters(2, 2))

__global__ void grid_sync_kernel(float* data, int) {
  grid_sync();  // line: grid_sync sync
  data[threadIdx.x] = 1.0f;
}
WRONG(grid_sync, blocks(2))

__global__ void grid_sync_after_exit_kernel(float*, int) {
  if (blockIdx.x == 1) return;
  grid_sync();  // line: grid_sync_after_exit sync
}
WRONG(grid_sync_after_exit, cooperative(2))

// ---- launches that a device refuses ----

__global__ void nothing_kernel(float*, int) {}

#if defined(PVK_SIMT)  // ptxas refuses to compile it
__global__ void much_static_shared_kernel(float* data, int) {
  SIMT_SHARED(float[13 * 1024], shared);
  shared[threadIdx.x] = data[threadIdx.x];
}
WRONG(much_static_shared, threads(64))
#endif

__global__ void static_and_dynamic_shared_kernel(float* data, int) {
  SIMT_SHARED(float[1024], shared);
  SIMT_DYN_SHARED(float, more);
  shared[threadIdx.x] = more[threadIdx.x] = data[threadIdx.x];
}
WRONG(static_and_dynamic_shared, dynamic_shared(227 * 1024))

#define REFUSED(name, config)                    \
  }                                              \
  SELFTEST wrong_##name() {                      \
    return run_on_zeros(nothing_kernel, config); \
  }                                              \
  namespace {
REFUSED(too_many_threads, threads(1025))
REFUSED(too_many_threads_in_all, threads(32, 33))
REFUSED(deep_block, threads(1, 1, 65))
REFUSED(empty_block, threads(0))
REFUSED(empty_grid, blocks(0))
REFUSED(empty_grid_y, blocks(1, 0))
REFUSED(high_grid, blocks(1, 65536))
REFUSED(deep_grid, blocks(1, 1, 65536))
REFUSED(too_much_shared, dynamic_shared(227 * 1024 + 1))
REFUSED(large_cluster, clusters(32, 17))
REFUSED(part_of_a_cluster, clusters(6, 4))
REFUSED(too_many_cooperative_blocks, cooperative(132 * 2 + 1, 1024))

}  // namespace

SELFTEST wrong_freed_memory() {
  return catch_error([] {
    float* data = nullptr;
    PVK_CUDA_CHECK(cudaMalloc(&data, kCount * sizeof(float)));
    PVK_CUDA_CHECK(cudaFree(data));
    launch(global_write_out_of_bounds_kernel, threads(64), data, kCount);
  });
}

SELFTEST wrong_host_memory() {
  return catch_error([] {
    float data[kCount + 1] = {};
    launch(global_write_out_of_bounds_kernel, threads(64), data, kCount);
  });
}

}  // namespace selftest
