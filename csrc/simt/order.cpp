// What precedes what. A thread knows of another's accesses up to some time through
//   - a barrier of its block, cluster or grid: up to the barrier's time, of all threads (`base`);
//   - a __syncwarp of its whole warp: of the warp's lanes (`Warp::base`);
//   - anything else (a __syncwarp of some lanes, named barriers, mbarriers): of each thread on its own, in its row of
//     `known`, which exists only where such a thing has happened.
// Shuffles and votes order nothing. A fence on both sides is taken as order, whatever they publish: on shared memory in
// the order of the fences, on global memory across blocks in either.
#include <algorithm>

#include "simt/machine.h"

namespace simt {
namespace {

unsigned cluster_threads() {
  return machine.spec.cluster * machine.threads_of_block;
}

// Rows are kept from launch to launch: what is in them is older than all stamps of this one.
uint32_t* row_of(Thread& thread) {
  if (thread.known != nullptr) return thread.known;
  if (machine.known_columns < cluster_threads()) {
    machine.known_rows.clear();
    for (Thread& other : machine.threads) other.known = nullptr;
    machine.known_columns = cluster_threads();
  }
  const size_t index = size_t(&thread - machine.threads.data());
  if (machine.known_rows.size() <= index) machine.known_rows.resize(machine.threads.size());
  if (!machine.known_rows[index]) machine.known_rows[index] = std::make_unique<uint32_t[]>(machine.known_columns);
  return thread.known = machine.known_rows[index].get();
}

void raise(uint32_t& value, uint32_t to) {
  value = std::max(value, to);
}

void advance(Thread& thread) {
  thread.time = ++machine.clock;
}

// All that the thread knows of the cluster's threads, itself included, joined into a row.
void add_knowledge(Thread& thread, uint32_t* row) {
  const Block& block = *thread.block;
  const unsigned first = block.rank * machine.threads_of_block;
  if (block.knows_more || thread.known != nullptr) {
    const uint32_t* const known = row_of(thread);
    for (unsigned i = 0; i < cluster_threads(); ++i) raise(row[i], known[i]);
  }
  for (unsigned i = 0; i < machine.threads_of_block; ++i) raise(row[first + i], block.base);
  const unsigned warp = thread.rank / kWarpSize;
  const unsigned end = std::min((warp + 1) * kWarpSize, machine.threads_of_block);
  for (unsigned i = warp * kWarpSize; i < end; ++i) raise(row[first + i], block.warps[warp].base);
  raise(row[first + thread.rank], machine.clock);
}

}  // namespace

uint32_t time_of(const Thread& thread) {
  return std::max(thread.time, thread.block->time);
}

bool precedes(uint32_t id, uint32_t time, const Thread& self) {
  const Block& block = *self.block;
  if (id == self.id || time <= machine.launch_base) return true;
  const uint32_t number = id / machine.threads_of_block, rank = id % machine.threads_of_block;
  if (number == block.number) {
    if (time <= block.base) return true;
    if (rank / kWarpSize == self.rank / kWarpSize && time <= block.warps[rank / kWarpSize].base) return true;
    return self.known != nullptr && self.known[block.rank * machine.threads_of_block + rank] >= time;
  }
  if (time <= machine.grid.base && machine.spec.cooperative) return true;
  const uint32_t first = block.number - block.rank;
  if (number >= first && number < first + machine.spec.cluster) {
    if (time <= block.cluster->base) return true;
    if (self.known != nullptr && self.known[(number - first) * machine.threads_of_block + rank] >= time) return true;
  }
  return machine.options.global_races && machine.fences[number] >= time && machine.fences[block.number] >= time;
}

void order_block(Block& block) {
  if (block.knows_more && machine.spec.cluster > 1) {  // what each knows of other blocks, all know
    std::vector<uint32_t> all(cluster_threads());
    for (unsigned rank = 0; rank < machine.threads_of_block; ++rank) add_knowledge(block.threads[rank], all.data());
    for (unsigned rank = 0; rank < machine.threads_of_block; ++rank)
      std::copy(all.begin(), all.end(), row_of(block.threads[rank]));
  } else {
    block.knows_more = false;
  }
  block.base = machine.clock;
  block.time = ++machine.clock;
  if (machine.cohort_blocks == 1) block.shared_base = block.base;
}

void order_warp(Block& block, Warp& warp, unsigned mask) {
  const unsigned first = unsigned(&warp - block.warps.data()) * kWarpSize;
  const bool whole = mask == warp.lanes;
  if (block.knows_more || !whole) {
    std::vector<uint32_t> all(cluster_threads());
    for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1)
      add_knowledge(block.threads[first + __builtin_ctz(lanes)], all.data());
    for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1)
      std::copy(all.begin(), all.end(), row_of(block.threads[first + __builtin_ctz(lanes)]));
    block.knows_more = true;
  }
  if (whole) warp.base = machine.clock;
  ++machine.clock;
  for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1)
    block.threads[first + __builtin_ctz(lanes)].time = machine.clock;
}

void order_meeting(Meeting& meeting, Block* begin, Block* end) {
  meeting.base = machine.clock++;
  for (Block* block = begin; block != end; ++block) {
    block->base = block->shared_base = meeting.base;
    block->cluster->base = meeting.base;
    block->time = machine.clock;
    block->knows_more = false;
  }
}

void release(Thread& self, std::vector<uint32_t>& clock) {
  clock.resize(cluster_threads());
  add_knowledge(self, clock.data());
  advance(self);
}

void acquire(Thread& self, const std::vector<uint32_t>& clock) {
  uint32_t* const row = row_of(self);
  for (size_t i = 0; i < clock.size(); ++i) raise(row[i], clock[i]);
  self.block->knows_more = true;
}

void fence() {
  Thread* const self = current;
  if (self == nullptr) return;
  std::vector<uint32_t>& clock = self->block->cluster->fences;
  release(*self, clock);
  acquire(*self, clock);
  if (!machine.options.global_races) return;
  machine.fences[self->block->number] = machine.clock;
  advance(*self);
}

}  // namespace simt
