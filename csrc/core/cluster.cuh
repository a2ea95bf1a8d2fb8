// Blocks that meet: those of a cluster, which read and write each other's shared memory (sm_90), and those of a
// cooperative launch. Each wrapper is PTX and its twin in the host emulator.
#pragma once

#include "core/warp.cuh"

#if !defined(PVK_SIMT)
#include <cooperative_groups.h>
#endif

namespace pvk {

PVK_DEVICE unsigned cluster_rank() {
#if defined(PVK_SIMT)
  return simt::cluster_rank();
#else
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

PVK_DEVICE unsigned cluster_size() {
#if defined(PVK_SIMT)
  return simt::cluster_size();
#else
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// The two halves of the cluster's barrier, by whole warps. Arriving releases what the thread did, to shared and global
// memory; waiting acquires what all others did before they arrived.
PVK_DEVICE void cluster_arrive(SIMT_ONLY_SITE) {
#if defined(PVK_SIMT)
  simt::cluster_arrive(simt_site);
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

PVK_DEVICE void cluster_wait(SIMT_ONLY_SITE) {
#if defined(PVK_SIMT)
  simt::cluster_wait(simt_site);
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A block must not exit while others still access its shared memory: one of these comes last.
PVK_DEVICE void cluster_sync(SIMT_ONLY_SITE) {
#if defined(PVK_SIMT)
  simt::cluster_arrive(simt_site);
  simt::cluster_wait(simt_site);
#else
  cluster_arrive();
  cluster_wait();
#endif
}

// The shared variable of the cluster's block `rank` that `shared` is in this block.
template <typename T>
PVK_DEVICE T* map_shared(T* shared, unsigned rank SIMT_SITE) {
#if defined(PVK_SIMT)
  return static_cast<T*>(simt::map_shared(shared, rank SIMT_AT_SITE));
#else
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return mapped;
#endif
}

// Every thread of the grid waits for all of them; the launch is cooperative.
PVK_DEVICE void grid_sync(SIMT_ONLY_SITE) {
#if defined(PVK_SIMT)
  simt::grid_sync(simt_site);
#else
  cooperative_groups::this_grid().sync();
#endif
}

}  // namespace pvk
