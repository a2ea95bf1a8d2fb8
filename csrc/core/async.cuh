// Copies from global to shared memory that run beside the thread (cp.async), and what hands shared memory from one
// group of threads to another: mbarriers and named barriers. Each wrapper is PTX and its twin in the host emulator.
#pragma once

#include "core/warp.cuh"

namespace pvk {

// ---- cp.async ----

// Starts a copy of BYTES (4, 8 or 16; both addresses are multiples of it). The thread that started it may read it after
// the wait for its group; others after a barrier that follows this wait.
template <int BYTES>
PVK_DEVICE void cp_async(void* shared, const void* global SIMT_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#if defined(PVK_SIMT)
  simt::cp_async(shared, global, BYTES, BYTES SIMT_AT_SITE);
#else
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (BYTES == 16) {  // past L1: a tile is read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_offset(shared)), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_offset(shared)), "l"(from), "n"(BYTES)
                 : "memory");
  }
#endif
}

// The same, but only the first `source_bytes` are read, and the rest is zero. `global` is aligned even where it is 0.
template <int BYTES>
PVK_DEVICE void cp_async(void* shared, const void* global, unsigned source_bytes SIMT_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#if defined(PVK_SIMT)
  simt::cp_async(shared, global, BYTES, source_bytes SIMT_AT_SITE);
#else
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_offset(shared)), "l"(from),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_offset(shared)), "l"(from), "n"(BYTES),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

// Closes the group of the copies that this thread has started since the last one. It may be empty.
PVK_DEVICE void cp_async_commit() {
#if defined(PVK_SIMT)
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all but the latest LEFT of this thread's groups.
template <int LEFT>
PVK_DEVICE void cp_async_wait() {
#if defined(PVK_SIMT)
  simt::cp_async_wait(LEFT);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Waits for every copy of this thread, in a group or not.
PVK_DEVICE void cp_async_wait_all() {
#if defined(PVK_SIMT)
  simt::cp_async_wait_all();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- mbarrier ----

// A barrier in shared memory. A phase is over when `count` arrivals have come, and the next one begins; the first has
// parity 0. An arrival releases what its thread did before, a wait acquires it. One thread initialises it, and a
// barrier of the block makes that known.
struct MBarrier {
  uint64_t word;

  PVK_DEVICE void init(unsigned count SIMT_SITE) {
#if defined(PVK_SIMT)
    simt::mbarrier_init(&word, count SIMT_AT_SITE);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_offset(&word)), "r"(count) : "memory");
#endif
  }

  // Before the memory is used for anything else.
  PVK_DEVICE void invalidate(SIMT_ONLY_SITE) {
#if defined(PVK_SIMT)
    simt::mbarrier_invalidate(&word SIMT_AT_SITE);
#else
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_offset(&word)) : "memory");
#endif
  }

  // For `count` threads at once.
  PVK_DEVICE void arrive(unsigned count = 1 SIMT_SITE) {
#if defined(PVK_SIMT)
    simt::mbarrier_arrive(&word, count SIMT_AT_SITE);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_offset(&word)), "r"(count) : "memory");
#else
#pragma unroll 1
    for (unsigned i = 0; i < count; ++i)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_offset(&word)) : "memory");
#endif
  }

  // Whether the phase of this parity is over.
  PVK_DEVICE bool test_wait(unsigned parity SIMT_SITE) {
#if defined(PVK_SIMT)
    return simt::mbarrier_test(&word, parity SIMT_AT_SITE);
#else
    unsigned over;
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(shared_offset(&word)), "r"(parity)
        : "memory");
    return over != 0;
#endif
  }

  PVK_DEVICE void wait(unsigned parity SIMT_SITE) {
#if defined(PVK_SIMT)
    simt::mbarrier_wait(&word, parity SIMT_AT_SITE);
#elif __CUDA_ARCH__ >= 900
    unsigned over;
    do {  // try_wait sleeps for a while before it gives up
      asm volatile(
          "{\n"
          ".reg .pred over;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
          "selp.u32 %0, 1, 0, over;\n"
          "}"
          : "=r"(over)
          : "r"(shared_offset(&word)), "r"(parity)
          : "memory");
    } while (over == 0);
#else
    while (!test_wait(parity)) {}
#endif
  }

  // wait() where other blocks of the cluster arrive: acquires what they did. sm_90.
  PVK_DEVICE void wait_cluster(unsigned parity SIMT_SITE) {
#if defined(PVK_SIMT)
    simt::mbarrier_wait(&word, parity SIMT_AT_SITE);
#else
    unsigned over;
    do {
      asm volatile(
          "{\n"
          ".reg .pred over;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
          "selp.u32 %0, 1, 0, over;\n"
          "}"
          : "=r"(over)
          : "r"(shared_offset(&word)), "r"(parity)
          : "memory");
    } while (over == 0);
#endif
  }
};

// Arrival at the barrier of another block; `mapped` is of map_shared(). sm_90.
PVK_DEVICE void arrive_cluster(MBarrier* mapped, unsigned count = 1 SIMT_SITE) {
#if defined(PVK_SIMT)
  simt::mbarrier_arrive(&mapped->word, count SIMT_AT_SITE);
#else
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(shared_offset(mapped)),
               "r"(count)
               : "memory");
#endif
}

// By the thread that has initialised barriers at which other blocks will arrive, before the cluster's barrier. sm_90.
PVK_DEVICE void fence_mbarrier_init() {
#if defined(PVK_SIMT)
  simt::fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// ---- named barriers of a block: 1 to 15; 0 is __syncthreads ----
// Whole warps come; the barrier is over when `threads` threads have. One that arrives goes on, one that syncs waits.

PVK_DEVICE void barrier_sync(unsigned id, unsigned threads SIMT_SITE) {
#if defined(PVK_SIMT)
  simt::barrier_sync(id, threads SIMT_AT_SITE);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

PVK_DEVICE void barrier_arrive(unsigned id, unsigned threads SIMT_SITE) {
#if defined(PVK_SIMT)
  simt::barrier_arrive(id, threads SIMT_AT_SITE);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace pvk
