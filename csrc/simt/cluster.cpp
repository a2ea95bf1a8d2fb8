// Barriers of clusters and grids, and the way to another block's shared memory.
#include "simt/machine.h"

namespace simt {
namespace {

void wake_all(Meeting& meeting) {
  machine.spins = 0;
  for (Thread* thread : meeting.waiting) wake(*thread);
  meeting.waiting.clear();
}

void complete_cluster(Block& any) {
  Meeting& meeting = *any.cluster;
  meeting.arrived = 0;
  order_meeting(meeting, any.cluster_begin, any.cluster_begin + machine.spec.cluster);
  for (Block* block = any.cluster_begin; block != any.cluster_begin + machine.spec.cluster; ++block) {
    for (unsigned rank = 0; rank < machine.threads_of_block; ++rank) block->threads[rank].cluster_arrived = false;
    block->cluster_arrivals.clear();
  }
  wake_all(meeting);
}

void complete_grid() {
  machine.grid.arrived = 0;
  order_meeting(machine.grid, machine.blocks.data(), machine.blocks.data() + machine.cohort_blocks);
  wake_all(machine.grid);
}

}  // namespace

unsigned cluster_rank() noexcept {
  return current->block->rank;
}

unsigned cluster_size() noexcept {
  return machine.spec.cluster;
}

// Exited threads count as arrived.
void leave_meetings(Thread& self) {
  Meeting& cluster = *self.block->cluster;
  --cluster.expected;
  if (self.cluster_arrived) --cluster.arrived;
  if (cluster.arrived > 0 && cluster.arrived == cluster.expected) complete_cluster(*self.block);
  if (machine.grid.arrived > 0)
    fail("the thread exits, but others wait for it at grid_sync " + line_of(machine.grid.site));
}

void cluster_arrive(Site site) {
  Thread& self = *current;
  Meeting& meeting = *self.block->cluster;
  if (self.cluster_waits) fail("cluster_arrive " + line_of(site) + " comes twice without a cluster_wait");
  arrive_with_warp(self, self.block->cluster_arrivals, "cluster_arrive", site);
  self.cluster_arrived = self.cluster_waits = true;
  meeting.site = site;
  if (++meeting.arrived == meeting.expected) complete_cluster(*self.block);
}

void cluster_wait(Site site) {
  Thread& self = *current;
  if (!self.cluster_waits) fail("cluster_wait " + line_of(site) + " comes without a cluster_arrive");
  self.cluster_waits = false;
  if (!self.cluster_arrived) return;  // complete already
  self.block->cluster->waiting.push_back(&self);
  wait_here(self, "cluster_wait", site);
}

void grid_sync(Site site) {
  Thread& self = *current;
  if (!machine.spec.cooperative) fail("grid_sync " + line_of(site) + " in a launch that is not cooperative");
  if (machine.alive < machine.grid.expected) fail("grid_sync " + line_of(site) + ", but other threads have exited");
  machine.grid.site = site;
  if (++machine.grid.arrived == machine.grid.expected) {
    complete_grid();
    wake(self);
    wait_here(self, nullptr, site);
  } else {
    machine.grid.waiting.push_back(&self);
    wait_here(self, "grid_sync", site);
  }
}

void* map_shared(const void* shared, unsigned rank, Site site) {
  Thread& self = *current;
  SharedPlace place;
  if (!find_shared(shared, place) || place.block != self.block)
    fail("map_shared " + line_of(site) + ": expected an address in the block's own shared memory");
  if (rank >= machine.spec.cluster)
    fail("map_shared " + line_of(site) + ": expected a rank below " + std::to_string(machine.spec.cluster) +
         ", but got " + std::to_string(rank));
  return self.block->cluster_begin[rank].shared + place.offset;
}

}  // namespace simt
