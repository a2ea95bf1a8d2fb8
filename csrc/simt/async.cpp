// What goes on beside a thread: cp.async, and mbarriers.
#include <algorithm>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

// Copies land here, and not before: what is missing is a wait.
void land_oldest(Thread& self, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = self.copies[i];
    std::memcpy(copy.target, copy.source, copy.source_bytes);
    std::memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    land_copy(copy.target, copy.bytes);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(count));
}

// A thread may arrive at another block's mbarrier, but only wait at its own.
enum class Whose { kOwn, kOfCluster };

Mbarrier& find_mbarrier(uint64_t* barrier, const char* what, Site site, Whose whose) {
  const auto where = [&] { return std::string(what) + " " + line_of(site); };
  SharedPlace place;
  if (!find_shared(barrier, place)) fail(where() + ": expected an mbarrier in shared memory");
  const auto found = place.block->mbarriers.find(place.offset);
  if (found == place.block->mbarriers.end())
    fail(where() + ": the mbarrier (" + describe_shared(place) + ") is not initialised");
  if (whose == Whose::kOwn && place.block != current->block)
    fail(where() + ": the mbarrier (" + describe_shared(place) + ") is in the shared memory of another block");
  return found->second;
}

void complete_phase(Mbarrier& barrier) {
  if (barrier.past_clock.size() < barrier.clock.size()) barrier.past_clock.resize(barrier.clock.size());
  for (size_t i = 0; i < barrier.clock.size(); ++i)
    barrier.past_clock[i] = std::max(barrier.past_clock[i], barrier.clock[i]);
  barrier.pending = barrier.count;
  ++barrier.phase;
  machine.spins = 0;
  for (Thread* thread : barrier.waiting) {
    acquire(*thread, barrier.past_clock);
    wake(*thread);
  }
  barrier.waiting.clear();
}

// Whether the phase of this parity is over: the phase under way has the other one.
bool is_over(const Mbarrier& barrier, unsigned parity) {
  return (barrier.phase & 1) != (parity & 1);
}

}  // namespace

[[gnu::noinline]] void cp_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site) {
  const void* const code = __builtin_return_address(0);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("cp.async " + line_of(site) + ": expected 4, 8 or 16 bytes, but got " + std::to_string(bytes));
  if (source_bytes > bytes)
    fail("cp.async " + line_of(site) + ": expected at most " + std::to_string(bytes) + " source bytes, but got " +
         std::to_string(source_bytes));
  if (is_shared(global)) fail("cp.async " + line_of(site) + ": expected the source to be in global memory");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("cp.async " + line_of(site) + ": misaligned source: the address is no multiple of " + std::to_string(bytes));
  observe(global, source_bytes, Access::kRead, false, code);
  start_copy(shared, bytes, code);
  current->copies.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, source_bytes, site});
}

void cp_async_commit() {
  unsigned count = 0;
  for (Copy& copy : current->copies) {
    count += !copy.committed;
    copy.committed = true;
  }
  current->copy_groups.push_back(count);
}

void cp_async_wait(unsigned groups_left) {
  Thread& self = *current;
  if (self.copy_groups.size() <= groups_left) return;
  const auto end = self.copy_groups.end() - groups_left;
  size_t count = 0;
  for (auto group = self.copy_groups.begin(); group != end; ++group) count += *group;
  self.copy_groups.erase(self.copy_groups.begin(), end);
  land_oldest(self, count);
}

void cp_async_wait_all() {
  land_oldest(*current, current->copies.size());
  current->copy_groups.clear();
}

[[gnu::noinline]] void mbarrier_init(uint64_t* barrier, unsigned count, Site site) {
  SharedPlace place;
  if (!find_shared(barrier, place) || place.block != current->block)
    fail("mbarrier init " + line_of(site) + ": expected an mbarrier in the block's shared memory");
  if (count == 0 || count >= 1u << 20)
    fail("mbarrier init " + line_of(site) + ": expected a count from 1 to 2^20 - 1, but got " + std::to_string(count));
  if (place.block->mbarriers.count(place.offset))
    fail("mbarrier init " + line_of(site) + ": the mbarrier (" + describe_shared(place) + ") is already initialised");
  observe(barrier, sizeof(*barrier), Access::kWrite, true, __builtin_return_address(0));
  *barrier = count;
  place.block->mbarriers[place.offset] = {count, count, 0, {}, {}, {}, {}};
}

[[gnu::noinline]] void mbarrier_invalidate(uint64_t* barrier, Site site) {
  const Mbarrier& state = find_mbarrier(barrier, "mbarrier invalidate", site, Whose::kOwn);
  if (!state.waiting.empty()) fail("mbarrier invalidate " + line_of(site) + ": threads wait at it");
  const size_t offset = size_t(reinterpret_cast<unsigned char*>(barrier) - current->block->shared);
  current->block->mbarriers.erase(offset);
  observe(barrier, sizeof(*barrier), Access::kWrite, true, __builtin_return_address(0));
}

[[gnu::noinline]] void mbarrier_arrive(uint64_t* barrier, unsigned count, Site site) {
  Thread& self = *current;
  Mbarrier& state = find_mbarrier(barrier, "mbarrier arrive", site, Whose::kOfCluster);
  observe(barrier, sizeof(*barrier), Access::kAtomicWrite, true, __builtin_return_address(0));
  const unsigned column = self.block->rank * machine.threads_of_block + self.rank;
  state.arrived_in.resize(machine.spec.cluster * machine.threads_of_block);
  if (state.arrived_in[column] == state.phase + 1)
    fail("mbarrier arrive " + line_of(site) +
         ": the thread arrives twice in one phase; arrive(count) stands for several");
  if (count == 0 || count > state.pending)
    fail("mbarrier arrive " + line_of(site) + ": " + std::to_string(count) + " arrivals, but the phase waits for " +
         std::to_string(state.pending) + " of " + std::to_string(state.count));
  state.arrived_in[column] = state.phase + 1;
  release(self, state.clock);
  state.pending -= count;
  if (state.pending == 0) complete_phase(state);
}

[[gnu::noinline]] bool mbarrier_test(uint64_t* barrier, unsigned parity, Site site) {
  Mbarrier& state = find_mbarrier(barrier, "mbarrier test", site, Whose::kOwn);
  observe(barrier, sizeof(*barrier), Access::kAtomicRead, true, __builtin_return_address(0));
  spin();
  if (!is_over(state, parity)) return false;
  acquire(*current, state.past_clock);
  return true;
}

[[gnu::noinline]] void mbarrier_wait(uint64_t* barrier, unsigned parity, Site site) {
  Mbarrier& state = find_mbarrier(barrier, "mbarrier wait", site, Whose::kOwn);
  observe(barrier, sizeof(*barrier), Access::kAtomicRead, true, __builtin_return_address(0));
  if (is_over(state, parity)) return acquire(*current, state.past_clock);
  state.waiting.push_back(current);
  wait_here(*current, "mbarrier wait", site);
}

}  // namespace simt
