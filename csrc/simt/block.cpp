// Warp collectives and block barriers: who has come, who is missing, and what cannot be.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "simt/machine.h"

namespace simt {
namespace {

bool same_place(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

bool same_name(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "%08x", mask);
  return text;
}

std::string at(const char* name, Site site) {
  return std::string(name) + " " + line_of(site);
}

Warp& warp_of(const Thread& thread) {
  return thread.block->warps[thread.rank / kWarpSize];
}

Thread& lane_of(const Thread& thread, int lane) {
  return thread.block->threads[thread.rank / kWarpSize * kWarpSize + lane];
}

bool is_one(unsigned mask) {
  return (mask & (mask - 1)) == 0;
}

std::string lanes_text(unsigned mask) {
  const int first = __builtin_ctz(mask);
  return is_one(mask) ? "lane " + std::to_string(first) : "lanes " + hex(mask);
}

// The gathering that the lane belongs to, new or begun by another lane.
Gathering& join(Thread& self, const char* name, unsigned mask, Finish finish, Site site) {
  Warp& warp = warp_of(self);
  const unsigned lane = self.rank % kWarpSize, bit = 1u << lane;
  if ((mask & bit) == 0)
    fail("lane " + std::to_string(lane) + " calls " + at(name, site) + " with mask " + hex(mask) +
         ", in which it is not");
  if ((mask & ~warp.lanes) != 0)
    fail(at(name, site) + " names " + lanes_text(mask & ~warp.lanes) + ", which the block does not have");
  if ((mask & warp.exited) != 0)
    fail(at(name, site) + " waits for " + lanes_text(mask & warp.exited) + ", which has exited");
  for (Gathering& gathering : warp.gatherings) {
    if (gathering.mask == mask && same_name(gathering.name, name) && same_place(gathering.site, site)) return gathering;
    const bool wait_for_each_other = (gathering.mask & bit) != 0 && (gathering.arrived & mask) != 0;
    if (!wait_for_each_other) continue;
    fail("warp " + std::to_string(self.rank / kWarpSize) + ": " + lanes_text(gathering.arrived) +
         (is_one(gathering.arrived) ? " waits at " : " wait at ") + at(gathering.name, gathering.site) + " with mask " +
         hex(gathering.mask) + ", but lane " + std::to_string(lane) + " arrives at " + at(name, site) + " with mask " +
         hex(mask));
  }
  warp.gatherings.push_back({name, site, mask, 0, finish, {}});
  return warp.gatherings.back();
}

// The last lane to arrive does this, and then takes its turn like the others.
void finish_gathering(Thread& self, Gathering& gathering, bool orders_memory) {
  Warp& warp = warp_of(self);
  const unsigned mask = gathering.mask, own = 1u << self.rank % kWarpSize;
  if (gathering.finish != nullptr) gathering.finish(gathering.operands, mask);
  if (orders_memory) order_warp(*self.block, warp, mask);
  std::swap(gathering, warp.gatherings.back());
  warp.gatherings.pop_back();
  machine.spins = 0;
  for (unsigned lanes = mask & ~own; lanes != 0; lanes &= lanes - 1) wake(lane_of(self, __builtin_ctz(lanes)));
}

void gather(const char* name, unsigned mask, void* operand, Finish finish, Site site, bool orders_memory) {
  Thread& self = *current;
  Gathering& gathering = join(self, name, mask, finish, site);
  const unsigned lane = self.rank % kWarpSize;
  gathering.arrived |= 1u << lane;
  gathering.operands[lane] = operand;
  if (gathering.arrived != mask) return wait_here(self, name, site, mask);
  finish_gathering(self, gathering, orders_memory);
  wake(self);
  wait_here(self, nullptr, site);
}

unsigned reduce(const Barrier& barrier) {
  switch (barrier.reduce) {
    case Reduce::kNone:
      return 0;
    case Reduce::kCount:
      return barrier.count;
    case Reduce::kAnd:
      return barrier.count == barrier.arrived;
    case Reduce::kOr:
      return barrier.count != 0;
  }
  return 0;
}

void wake_all(std::vector<Thread*>& waiting) {
  machine.spins = 0;
  for (Thread* thread : waiting) wake(*thread);
  waiting.clear();
}

void complete_block_barrier(Block& block) {
  Barrier& barrier = block.barriers[0];
  block.reduced = reduce(barrier);
  barrier.arrived = barrier.count = 0;
  order_block(block);
  wake_all(barrier.waiting);
}

// A named barrier counts whole warps.
void check_whole_warps(const Thread& self, Barrier& barrier, unsigned id) {
  for (unsigned w = 0; w < barrier.warps.size(); ++w) {
    const Warp& warp = self.block->warps[w];
    WarpArrival& arrival = barrier.warps[w];
    if (arrival.lanes != 0 && (warp.lanes & ~warp.exited & ~arrival.lanes) != 0)
      fail("barrier " + std::to_string(id) + " is complete with " + lanes_text(arrival.lanes) + " of warp " +
           std::to_string(w) + ", which are at " + at(arrival.name, arrival.site) +
           ", but only whole warps can come to it");
    arrival = {};
  }
}

// A named barrier counts warps: lanes that a warp does not have, or that have exited, come with its last one.
void count_missing_lanes(const Block& block, Barrier& barrier, unsigned w) {
  WarpArrival& arrival = barrier.warps[w];
  const Warp& warp = block.warps[w];
  if (arrival.lanes == 0 || arrival.counted || (warp.lanes & ~warp.exited & ~arrival.lanes) != 0) return;
  arrival.counted = true;
  barrier.arrived += kWarpSize - unsigned(__builtin_popcount(arrival.lanes));
}

// Barriers 1 to 15, and barrier 0 with a count.
Barrier& join_named(Thread& self, const char* name, unsigned id, unsigned threads, Site site) {
  if (id >= kBarriers) fail(at(name, site) + ": expected a barrier below 16, but got " + std::to_string(id));
  if (threads == 0 || threads % kWarpSize != 0 || threads > kMaxThreads)
    fail(at(name, site) + ": expected the number of threads to be a multiple of 32, at most 1024, but got " +
         std::to_string(threads));
  Barrier& barrier = self.block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.site = site;
    barrier.expected = threads;
    barrier.clock.clear();
  } else if (barrier.expected != threads) {
    fail(at(name, site) + " expects " + std::to_string(threads) + " threads at barrier " + std::to_string(id) +
         ", but " + at(barrier.name, barrier.site) + " expects " + std::to_string(barrier.expected));
  }
  arrive_with_warp(self, barrier.warps, name, site);
  release(self, barrier.clock);
  ++barrier.arrived;
  count_missing_lanes(*self.block, barrier, self.rank / kWarpSize);
  if (barrier.arrived == barrier.expected) check_whole_warps(self, barrier, id);
  return barrier;
}

void complete_named(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) acquire(*thread, barrier.clock);
  barrier.arrived = barrier.expected = 0;
  wake_all(barrier.waiting);
}

}  // namespace

// The lanes of a warp come to a barrier at one place.
void arrive_with_warp(Thread& self, std::vector<WarpArrival>& warps, const char* name, Site site) {
  warps.resize(self.block->warps.size());
  WarpArrival& arrival = warps[self.rank / kWarpSize];
  const unsigned bit = 1u << self.rank % kWarpSize;
  if (arrival.lanes & bit) arrival = {};  // the warp comes again
  if (arrival.lanes != 0 && (!same_name(arrival.name, name) || !same_place(arrival.site, site)))
    fail("a barrier in divergent code: the thread arrives at " + at(name, site) + ", but " + lanes_text(arrival.lanes) +
         " of its warp arrived at " + at(arrival.name, arrival.site));
  arrival.lanes |= bit;
  arrival.name = name;
  arrival.site = site;
}

void start_barriers(Block& block) {
  block.cluster_arrivals.clear();
  for (Barrier& barrier : block.barriers) {
    barrier.arrived = barrier.expected = barrier.count = 0;
    barrier.waiting.clear();
    barrier.warps.clear();
  }
  const unsigned threads = machine.threads_of_block;
  block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    const unsigned lanes = std::min(threads - w * kWarpSize, unsigned(kWarpSize));
    warp.lanes = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    warp.exited = 0;
    warp.base = machine.cohort_base;
    warp.gatherings.clear();
  }
}

void leave_barriers(Thread& self) {
  Block& block = *self.block;
  Warp& warp = warp_of(self);
  const unsigned bit = 1u << self.rank % kWarpSize;
  self.exited = true;
  warp.exited |= bit;
  --block.alive;
  for (const Gathering& gathering : warp.gatherings) {
    if (gathering.mask & bit)
      fail("the thread exits, but " + lanes_text(gathering.arrived) +
           (is_one(gathering.arrived) ? " waits for it at " : " wait for it at ") + at(gathering.name, gathering.site) +
           " with mask " + hex(gathering.mask));
  }
  Barrier& barrier = block.barriers[0];
  if (barrier.expected == 0 && barrier.arrived > 0 && barrier.arrived == block.alive) complete_block_barrier(block);
  for (unsigned id = 0; id < kBarriers; ++id) {
    Barrier& named = block.barriers[id];
    if (named.expected == 0 || named.arrived == 0) continue;
    count_missing_lanes(block, named, self.rank / kWarpSize);
    if (named.arrived != named.expected) continue;
    check_whole_warps(self, named, id);
    complete_named(named);
  }
}

void collective(const char* name, unsigned mask, void* operand, Finish finish, Site site) {
  gather(name, mask, operand, finish, site, false);
}

void sync_warp(unsigned mask, Site site) {
  // The lanes that a last, shorter warp does not have cannot be waited for.
  gather("__syncwarp", mask & warp_of(*current).lanes, nullptr, nullptr, site, true);
}

unsigned sync_threads(const char* name, Reduce reduce, bool predicate, Site site) {
  Thread& self = *current;
  Block& block = *self.block;
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.reduce = reduce;
    barrier.site = site;
    barrier.first_thread = self.id;
  } else if (barrier.expected != 0 || !same_name(barrier.name, name) || !same_place(barrier.site, site)) {
    fail("a barrier in divergent code: the thread arrives at " + at(name, site) + ", but " +
         name_of_thread(barrier.first_thread) + " waits at " + at(barrier.name, barrier.site));
  }
  ++barrier.arrived;
  barrier.count += predicate;
  if (barrier.arrived == block.alive) {
    complete_block_barrier(block);
    wake(self);
    wait_here(self, nullptr, site);
  } else {
    barrier.waiting.push_back(&self);
    wait_here(self, name, site);
  }
  return block.reduced;
}

void barrier_sync(unsigned id, unsigned threads, Site site) {
  Thread& self = *current;
  Barrier& barrier = join_named(self, "bar.sync", id, threads, site);
  if (barrier.arrived == barrier.expected) {
    acquire(self, barrier.clock);
    complete_named(barrier);
    wake(self);
    wait_here(self, nullptr, site);
  } else {
    barrier.waiting.push_back(&self);
    wait_here(self, "bar.sync", site);
  }
}

void barrier_arrive(unsigned id, unsigned threads, Site site) {
  Barrier& barrier = join_named(*current, "bar.arrive", id, threads, site);
  if (barrier.arrived == barrier.expected) complete_named(barrier);
}

std::string describe_waiting() {
  // Of the first block that is stuck: where its threads are, and how many.
  for (unsigned slot = 0; slot < machine.cohort_blocks; ++slot) {
    const Block& block = machine.blocks[slot];
    if (block.alive == 0) continue;
    std::map<std::string, unsigned> places;
    for (unsigned rank = 0; rank < machine.threads_of_block; ++rank) {
      const Thread& thread = block.threads[rank];
      std::string place = "[exited]";
      if (!thread.exited) {
        place = thread.waits_for == nullptr ? "[running]" : "[" + at(thread.waits_for, thread.site);
        if (thread.waits_for != nullptr && thread.waits_mask != 0) place += " mask " + hex(thread.waits_mask);
        if (thread.waits_for != nullptr) place += "]";
      }
      ++places[place];
    }
    std::string text = "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
                       std::to_string(block.index.z) + "): ";
    const char* separator = "";
    for (const auto& [place, count] : places) {
      text += separator + place + " x" + std::to_string(count);
      separator = ", ";
    }
    return text;
  }
  return "no thread is left";
}

}  // namespace simt
