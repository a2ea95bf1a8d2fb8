// Shared memory: where the variables of a block lie, with gaps between them.
#include <algorithm>
#include <cstring>

#include "simt/machine.h"

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

// Aligned to 16 bytes and to no more, as a kernel may rely on no more.
size_t dynamic_offset() {
  const size_t end = kArenaBytes - kGapBytes - machine.spec.dynamic_shared_bytes;
  return end / 32 * 32 - 16;
}

void open_for_asan(const unsigned char* begin, size_t bytes) {
#if defined(SIMT_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
#else
  (void)begin, (void)bytes;
#endif
}

// What uninitialised memory holds: NaN in fp32, fp16 and bf16.
void poison(unsigned char* begin, size_t bytes) {
  open_for_asan(begin, bytes);
  std::memset(begin, 0xff, bytes);
}

void place(SharedVariable& variable) {
  machine.static_bytes += variable.bytes;
  if (machine.static_bytes > kStaticSharedBytes)
    fail("`" + std::string(variable.name) + "` makes it " + std::to_string(machine.static_bytes) +
         " bytes of static shared memory, but at most 49152 are allowed");
  const size_t bytes = machine.static_bytes + machine.spec.dynamic_shared_bytes;
  if (bytes > machine.spec.shared_bytes_limit)
    fail("`" + std::string(variable.name) + "` makes it " + std::to_string(bytes) +
         " bytes of shared memory, static and dynamic, but at most " + std::to_string(machine.spec.shared_bytes_limit) +
         " are allowed" + (bytes <= kSharedBytes ? " without cudaFuncAttributeMaxDynamicSharedMemorySize" : ""));
  const size_t alignment = std::max<size_t>(variable.alignment, 16);
  variable.offset = (machine.static_end + kGapBytes + alignment - 1) / alignment * alignment;
  machine.static_end = variable.offset + variable.bytes;
  if (machine.static_end + kGapBytes > dynamic_offset()) fail("too many shared variables for the gaps between them");
  variable.launch = machine.launches;
  machine.shared_variables.push_back(&variable);
  for (unsigned slot = 0; slot < machine.cohort_blocks; ++slot)
    poison(machine.blocks[slot].shared + variable.offset, variable.bytes);
}

struct Extent {
  const char* name;
  size_t begin, bytes;
};

Extent dynamic_extent() {
  return {"dynamic shared memory", dynamic_offset(), machine.spec.dynamic_shared_bytes};
}

template <typename Visit>
void for_each_extent(const Visit& visit) {
  for (const SharedVariable* variable : machine.shared_variables)
    visit(Extent{variable->name, variable->offset, variable->bytes});
  visit(dynamic_extent());
}

}  // namespace

void start_shared(Block& block) {
  block.shared = machine.arenas + block.slot * kArenaBytes;
#if defined(SIMT_ASAN)
  ASAN_POISON_MEMORY_REGION(block.shared, kArenaBytes);
#endif
  for_each_extent([&](const Extent& extent) { poison(block.shared + extent.begin, extent.bytes); });
}

void* shared_address(SharedVariable& variable) {
  if (variable.launch != machine.launches) place(variable);
  return current->block->shared + variable.offset;
}

void* dynamic_shared_address() noexcept {
  return current->block->shared + dynamic_offset();
}

bool find_shared(const void* address, SharedPlace& place) {
  const size_t offset = static_cast<const unsigned char*>(address) - machine.arenas;
  if (offset >= machine.cohort_blocks * kArenaBytes) return false;
  place = {&machine.blocks[offset / kArenaBytes], offset % kArenaBytes};
  return true;
}

bool is_shared(const void* address) noexcept {
  SharedPlace place;
  return find_shared(address, place);
}

bool is_in_variable(size_t offset, size_t bytes) noexcept {
  const auto inside = [&](size_t begin, size_t size) {
    return offset - begin < size && bytes <= size - (offset - begin);
  };
  for (const SharedVariable* variable : machine.shared_variables) {
    if (inside(variable->offset, variable->bytes)) return true;
  }
  return inside(dynamic_offset(), machine.spec.dynamic_shared_bytes);
}

std::vector<std::pair<size_t, size_t>> shared_extents() {
  std::vector<std::pair<size_t, size_t>> extents;
  for_each_extent([&](const Extent& extent) { extents.emplace_back(extent.begin, extent.bytes); });
  return extents;
}

std::string describe_shared(const SharedPlace& place) {
  Extent best{nullptr, 0, 0};
  size_t best_distance = ~size_t(0);
  for_each_extent([&](const Extent& extent) {
    const size_t end = extent.begin + extent.bytes;
    const size_t distance = place.offset < extent.begin ? extent.begin - place.offset
                            : place.offset < end        ? 0
                                                        : place.offset - end + 1;
    if (distance < best_distance) best = extent, best_distance = distance;
  });
  const std::string name = best.name == dynamic_extent().name ? best.name : "`" + std::string(best.name) + "`";
  if (place.offset < best.begin) return std::to_string(best.begin - place.offset) + " bytes before " + name;
  const std::string size = " of " + name + " (" + std::to_string(best.bytes) + " bytes)";
  return "byte " + std::to_string(place.offset - best.begin) + size;
}

}  // namespace simt
