// Every access of a kernel comes here: is it aligned, is it in memory that the thread may touch, has the shared memory
// been written, and does it race?
#include <link.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

#if defined(SIMT_HOOKS)
constexpr bool kSeesAllAccesses = true;
#else
constexpr bool kSeesAllAccesses = false;  // only what calls check_access: no history
#endif

const char* verb(Access access) {
  switch (access) {
    case Access::kRead:
      return "reads";
    case Access::kWrite:
      return "writes";
    case Access::kAtomicRead:
      return "atomically reads";
    case Access::kAtomicWrite:
      return "atomically writes";
  }
  return "";
}

bool writes(Access access) {
  return access == Access::kWrite || access == Access::kAtomicWrite;
}

bool is_atomic(Access access) {
  return access == Access::kAtomicRead || access == Access::kAtomicWrite;
}

// One access, as the functions below pass it on.
struct Observed {
  Thread& self;
  uintptr_t address;
  size_t bytes;
  Access access;
  bool aligned;  // to its size, as loads and stores of scalars and vectors must be
  const void* code;
};

std::string describe_place(const Observed& o) {
  SharedPlace place;
  if (find_shared(reinterpret_cast<const void*>(o.address), place)) return describe_shared(place);
  return "global memory";
}

[[noreturn]] void refuse(const Observed& o, const std::string& what) {
  fail(std::string(verb(o.access)) + " " + std::to_string(o.bytes) + " bytes at " + line_of(place_of(o.code)) + ": " +
       what);
}

[[noreturn, gnu::cold]] void report_race(const Observed& o, uint32_t other, const char* others_verb,
                                         uint32_t others_place) {
  SharedPlace place;
  const bool shared = find_shared(reinterpret_cast<const void*>(o.address), place);
  fail("race on " + (shared ? "shared memory, " + describe_shared(place) : std::string("global memory")) + ": it " +
       verb(o.access) + " " + std::to_string(o.bytes) + " bytes at " + line_of(place_of(o.code)) + ", but " +
       name_of_thread(other) + " " + others_verb + " there at " + line_of(others_place) +
       ", and nothing orders the two");
}

// Gives the list of further readers back, if it is of this cohort.
void free_more(Cell& cell) {
  if (cell.more != 0 && cell.readers.time > machine.readers_base) machine.free_readers.push_back(cell.more);
  cell.more = 0;
}

// An empty list.
uint32_t take_more() {
  if (machine.free_readers.empty()) {
    machine.more_readers.emplace_back();
    return uint32_t(machine.more_readers.size());
  }
  const uint32_t more = machine.free_readers.back();
  machine.free_readers.pop_back();
  machine.more_readers[more - 1].clear();
  return more;
}

bool same_readers(const Readers& a, const Readers& b) {
  return a.warp == b.warp && a.time == b.time && a.atomic == b.atomic && a.wrote == b.wrote;
}

const char* verb(const Readers& readers) {
  return readers.wrote ? "atomically writes" : readers.atomic ? "atomically reads" : "reads";
}

void check_readers(const Observed& o, const Readers& readers, uint32_t base) {
  if (readers.time <= base || (readers.atomic && is_atomic(o.access))) return;
  if (!writes(o.access) && !readers.wrote) return;
  const unsigned warps = (machine.threads_of_block + kWarpSize - 1) / kWarpSize;
  for (unsigned lanes = readers.lanes; lanes != 0; lanes &= lanes - 1) {
    const uint32_t id = readers.warp / warps * machine.threads_of_block + readers.warp % warps * kWarpSize +
                        unsigned(__builtin_ctz(lanes));
    if (!precedes(id, readers.time, o.self)) report_race(o, id, verb(readers), readers.place);
  }
}

constexpr size_t kSearchedReaders = 64;  // of the latest, for lanes that read together
constexpr size_t kManyReaders = 1024;    // from then on a list is shortened

// A later access of a thread stands for its earlier ones of the same kind: who knows of it knows of them. Beyond half
// of the limit the oldest are forgotten.
void shorten(std::vector<Readers>& more) {
  std::stable_sort(more.begin(), more.end(), [](const Readers& a, const Readers& b) { return a.time > b.time; });
  std::unordered_map<uint64_t, uint32_t> seen;  // lanes, by warp and kind
  size_t kept = 0;
  for (Readers& readers : more) {
    uint32_t& lanes = seen[uint64_t(readers.warp) << 2 | readers.atomic << 1 | readers.wrote];
    readers.lanes &= ~lanes;
    lanes |= readers.lanes;
    if (readers.lanes != 0) more[kept++] = readers;
  }
  more.resize(std::min(kept, kManyReaders / 2));
  std::reverse(more.begin(), more.end());
}

void add_reader(const Observed& o, Cell& cell, uint32_t base, uint32_t place) {
  const Block& block = *o.self.block;
  const unsigned warps = unsigned(block.warps.size());
  const uint32_t warp = block.number * warps + o.self.rank / kWarpSize, time = time_of(o.self);
  Readers mine = {time, 1u << o.self.rank % kWarpSize, place, warp, is_atomic(o.access), writes(o.access)};
  Readers& first = cell.readers;
  if (first.time <= base) {
    free_more(cell);
    first = mine;
    cell.updated = mine.wrote;
    return;
  }
  cell.updated |= mine.wrote;
  const auto join = [&](Readers& readers) {
    if (!same_readers(readers, mine)) return false;
    readers.lanes |= mine.lanes;
    readers.place = place;
    return true;
  };
  if (join(first)) return;
  if (cell.more == 0) cell.more = take_more();
  auto& more = machine.more_readers[cell.more - 1];
  const size_t searched = std::min(more.size(), kSearchedReaders);
  if (std::any_of(more.rbegin(), more.rbegin() + ptrdiff_t(searched), join)) return;
  if (more.size() >= kManyReaders) shorten(more);
  more.push_back(mine);
}

// `base`: accesses up to then precede this one.
void update(const Observed& o, Cell& cell, uint32_t base, bool pending) {
  const uint32_t place = place_of(o.code);
  if (cell.pending && cell.write_time > machine.cohort_base)
    refuse(o, describe_place(o) + ", which a cp.async of " + name_of_thread(cell.writer) + ", issued at " +
                  line_of(cell.write_place) + ", has not been waited for");
  if (cell.write_time > base && !(cell.atomic && is_atomic(o.access)) &&
      !precedes(cell.writer, cell.write_time, o.self))
    report_race(o, cell.writer, cell.atomic ? "atomically writes" : "writes", cell.write_place);
  if (writes(o.access) || cell.updated) {
    check_readers(o, cell.readers, base);
    if (cell.more != 0 && cell.readers.time > base) {
      for (const Readers& readers : machine.more_readers[cell.more - 1]) check_readers(o, readers, base);
    }
  }
  // An atomic does not make a plain write forgotten that others may not know of.
  const bool keeps_write = o.access == Access::kAtomicWrite && cell.write_time > base;
  if (keeps_write || !writes(o.access)) return add_reader(o, cell, base, place);
  free_more(cell);
  cell.readers.time = 0;
  cell.updated = 0;
  cell.write_time = time_of(o.self);
  cell.write_place = place;
  cell.writer = o.self.id;
  cell.atomic = is_atomic(o.access);
  cell.pending = pending;
}

void split_word(Shadow& shadow, size_t offset) {
  const Cell& word = shadow.word(offset);
  for (size_t i = 0; i < 4; ++i) {
    Cell& byte = shadow.byte(offset / 4 * 4 + i);
    byte = word;
    if (byte.more == 0 || word.readers.time <= machine.readers_base) continue;
    byte.more = take_more();
    machine.more_readers[byte.more - 1] = machine.more_readers[word.more - 1];
  }
  shadow.split_in(offset) = uint32_t(machine.launches);
}

// Visits the cells of `bytes` bytes: whole words, or bytes where a word is not accessed as one.
template <typename Visit>
void for_each_cell(Shadow& shadow, size_t offset, size_t bytes, const Visit& visit) {
  const size_t end = offset + bytes;
  while (offset < end) {
    const bool whole = offset % 4 == 0 && end - offset >= 4;
    const bool split = shadow.split_in(offset) == uint32_t(machine.launches);
    if (whole && !split) {
      visit(shadow.word(offset), true);
      offset += 4;
      continue;
    }
    if (!split) split_word(shadow, offset);
    for (const size_t next = std::min(end, offset / 4 * 4 + 4); offset < next; ++offset)
      visit(shadow.byte(offset), false);
  }
}

void observe_shared(const Observed& o, size_t arena_offset, bool pending) {
  Block& owner = machine.blocks[arena_offset / kArenaBytes];
  const size_t offset = arena_offset % kArenaBytes;
  if (!is_in_variable(offset, o.bytes)) refuse(o, "out of bounds of shared memory: " + describe_place(o));
  if (owner.alive == 0) refuse(o, describe_place(o) + " of a block of the cluster that has exited");
  if (!kSeesAllAccesses || !machine.options.races) return;
  const uint32_t base = o.self.block->shared_base;
  if (o.access == Access::kWrite && !owner.mbarriers.empty() && owner.mbarriers.count(offset / 8 * 8))
    refuse(o, describe_place(o) + ", which is an mbarrier");
  unsigned padding = 0;  // bytes of a word that nobody has written
  for_each_cell(*machine.shared_shadow, arena_offset, o.bytes, [&](Cell& cell, bool is_word) {
    if (!writes(o.access) && cell.write_time <= machine.cohort_base) {
      // A struct is copied with its padding.
      if (o.aligned || is_word || ++padding == 4)
        refuse(o, describe_place(o) +
                      ", which no thread has written yet: uninitialised shared memory, or a missing barrier");
      return;
    }
    padding = 0;
    update(o, cell, base, pending);
  });
}

struct Segment {
  uintptr_t begin, end;
};

// Constants and variables of the library that the kernels are in.
const std::vector<Segment>& own_segments() {
  static const std::vector<Segment> segments = [] {
    std::vector<Segment> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          const uintptr_t self = reinterpret_cast<uintptr_t>(&machine);
          std::vector<Segment> mine;
          bool is_own = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            mine.push_back({begin, begin + header.p_memsz});
            is_own |= self - begin < header.p_memsz;
          }
          if (is_own) *static_cast<std::vector<Segment>*>(out) = mine;
          return int(is_own);
        },
        &found);
    return found;
  }();
  return segments;
}

bool is_own_data(uintptr_t address) {
  if (address - reinterpret_cast<uintptr_t>(machine.parameters) < machine.parameter_bytes) return true;
  for (const Segment& segment : own_segments()) {
    if (address - segment.begin < segment.end - segment.begin) return true;
  }
  return false;
}

[[noreturn, gnu::cold]] void report_out_of_bounds(const Observed& o) {
  if (machine.stacks.contains(reinterpret_cast<const void*>(o.address)))
    refuse(o, "the local memory of another thread");
  const GlobalRange* nearest = nullptr;
  uintptr_t nearest_distance = ~uintptr_t(0);
  const auto look = [&](const GlobalRange& range) {
    const uintptr_t distance =
        o.address < range.begin ? range.begin - o.address : o.address + o.bytes - (range.begin + range.bytes);
    if (distance < nearest_distance) nearest = &range, nearest_distance = distance;
  };
  for (const GlobalRange& range : *machine.ranges) look(range);
  for (const GlobalRange& range : machine.allocations) look(range);
  char address[32];
  std::snprintf(address, sizeof(address), "0x%" PRIxPTR, o.address);
  std::string text = std::string("out of bounds of global memory: ") + address;
  if (nearest != nullptr) {
    const intptr_t behind = intptr_t(o.address - (nearest->begin + nearest->bytes));
    text += o.address < nearest->begin ? ", " + std::to_string(nearest->begin - o.address) + " bytes before the begin"
            : behind < 0               ? ", across the end"
                                       : ", " + std::to_string(behind) + " bytes behind the end";
    text += " of an array of " + std::to_string(nearest->bytes) + " bytes";
  }
  refuse(o, text);
}

// Whether the access is in the range; then it is recorded.
bool observe_range(const Observed& o, GlobalRange& range) {
  const uintptr_t offset = o.address - range.begin;
  if (offset >= range.bytes || o.bytes > range.bytes - offset) return false;
  if (!kSeesAllAccesses || !machine.options.global_races) return true;
  const size_t shift = range.begin % 4;  // words of memory are words of the shadow
  if (!range.shadow || range.era != machine.era) {
    range.shadow = std::make_unique<Shadow>(range.bytes + shift);
    range.era = machine.era;
  }
  const uint32_t base = machine.spec.cooperative ? machine.grid.base : machine.launch_base;
  for_each_cell(*range.shadow, offset + shift, o.bytes, [&](Cell& cell, bool) { update(o, cell, base, false); });
  return true;
}

void observe_global(const Observed& o) {
  for (GlobalRange& range : *machine.ranges) {
    if (observe_range(o, range)) return;
  }
  for (GlobalRange& range : machine.allocations) {
    if (observe_range(o, range)) return;
  }
  if (!is_own_data(o.address)) report_out_of_bounds(o);
}

}  // namespace

void observe(const void* pointer, size_t bytes, Access access, bool aligned, const void* code) {
  Thread* const self = current;
  if (self == nullptr || bytes == 0) return;
  const Observed o{*self, reinterpret_cast<uintptr_t>(pointer), bytes, access, aligned, code};
  const uintptr_t stack = reinterpret_cast<uintptr_t>(self->context.stack_low);
  if (o.address - stack < kStackBytes) return;
  if (aligned && (o.address & (bytes - 1)) != 0)
    refuse(o, "misaligned: the address is no multiple of " + std::to_string(bytes) + ", " + describe_place(o));
  const size_t arena_offset = o.address - reinterpret_cast<uintptr_t>(machine.arenas);
  if (arena_offset < machine.cohort_blocks * kArenaBytes) return observe_shared(o, arena_offset, false);
  observe_global(o);
}

[[gnu::noinline]] void check_access(const void* address, size_t bytes, Access access) {
  observe(address, bytes, access, true, __builtin_return_address(0));
}

void start_copy(void* shared, size_t bytes, const void* code) {
  const Observed o{*current, reinterpret_cast<uintptr_t>(shared), bytes, Access::kWrite, true, code};
  SharedPlace place;
  if (!find_shared(shared, place) || place.block != o.self.block)
    refuse(o, "expected the destination of cp.async to be in the block's shared memory");
  if ((o.address & (bytes - 1)) != 0)
    refuse(o, "misaligned cp.async: the address is no multiple of " + std::to_string(bytes) + ", " + describe_place(o));
  observe_shared(o, o.address - reinterpret_cast<uintptr_t>(machine.arenas), true);
  std::memset(shared, 0xff, bytes);
}

void land_copy(void* shared, size_t bytes) {
  if (!kSeesAllAccesses || !machine.options.races) return;
  const size_t offset = static_cast<unsigned char*>(shared) - machine.arenas;
  for_each_cell(*machine.shared_shadow, offset, bytes, [&](Cell& cell, bool) {
    cell.pending = 0;
    cell.write_time = time_of(*current);
  });
}

namespace {

// Whether an access by another block of the cluster came before the exit for all that the block's threads knew.
void check_before_exit(const Block& block, size_t offset, uint32_t id, uint32_t time, uint32_t place,
                       const char* others_verb) {
  const uint32_t number = id / machine.threads_of_block, first = block.number - block.rank;
  if (time <= block.shared_base || number == block.number) return;
  if (block.exit_clock[(number - first) * machine.threads_of_block + id % machine.threads_of_block] >= time) return;
  fail("the block exits, but " + name_of_thread(id) + " " + others_verb + " " +
       describe_shared({const_cast<Block*>(&block), offset}) + " at " + line_of(place) +
       ", and nothing orders the two: it may be an access to a block of the cluster that has exited");
}

}  // namespace

void leave_shared(Thread& self) {
  Block& block = *self.block;
  if (!kSeesAllAccesses || !machine.options.races || machine.spec.cluster == 1) return;
  release(self, block.exit_clock);
  if (block.alive > 0) return;
  const unsigned warps = unsigned(block.warps.size());
  for (const auto& [begin, bytes] : shared_extents()) {
    size_t offset = begin;  // of about where the cell is
    for_each_cell(*machine.shared_shadow, block.slot * kArenaBytes + begin, bytes, [&](const Cell& cell, bool) {
      check_before_exit(block, offset, cell.writer, cell.write_time, cell.write_place, "writes");
      const auto check = [&](const Readers& readers) {
        for (unsigned lanes = readers.lanes; lanes != 0; lanes &= lanes - 1) {
          const uint32_t id = readers.warp / warps * machine.threads_of_block + readers.warp % warps * kWarpSize +
                              unsigned(__builtin_ctz(lanes));
          check_before_exit(block, offset, id, readers.time, readers.place, verb(readers));
        }
      };
      check(cell.readers);
      if (cell.more != 0 && cell.readers.time > machine.readers_base) {
        for (const Readers& readers : machine.more_readers[cell.more - 1]) check(readers);
      }
    });
  }
}

// ---- which global memory there is ----

std::vector<GlobalRange>& global_ranges() {
  static thread_local std::vector<GlobalRange> ranges;
  return ranges;
}

GlobalScope::GlobalScope() : count_(global_ranges().size()) {}

GlobalScope::~GlobalScope() {
  global_ranges().resize(count_);
}

void allow_global(const void* begin, size_t bytes) {
  if (bytes > 0) global_ranges().push_back({reinterpret_cast<uintptr_t>(begin), bytes});
}

void add_allocation(const void* begin, size_t bytes) {
  const std::lock_guard<std::mutex> lock(machine.running);
  machine.allocations.push_back({reinterpret_cast<uintptr_t>(begin), bytes});
}

void remove_allocation(const void* begin) {
  const std::lock_guard<std::mutex> lock(machine.running);
  std::erase_if(machine.allocations,
                [&](const GlobalRange& range) { return range.begin == reinterpret_cast<uintptr_t>(begin); });
}

}  // namespace simt
