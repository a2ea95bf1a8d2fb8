// Groups of boxes on the CPU: any integers become 0, 1, 2, ... in the order in which they are met.
#pragma once

#include <cstring>

#include "core/buffer.h"
#include "core/simd.h"

namespace pvk::nms::PVK_ISA {

using namespace pvk::PVK_ISA;

PVK_INLINE uint64_t load_group(const void* groups, int bytes, int64_t index) {
  const char* const source = static_cast<const char*>(groups) + index * bytes;
  switch (bytes) {
    case 1:
      return uint8_t(*source);
    case 2: {
      uint16_t value;
      std::memcpy(&value, source, 2);
      return value;
    }
    case 4: {
      uint32_t value;
      std::memcpy(&value, source, 4);
      return value;
    }
    default: {
      uint64_t value;
      std::memcpy(&value, source, 8);
      return value;
    }
  }
}

// A hash table with open addressing, at most half full.
class GroupTable {
 public:
  int64_t count() const { return count_; }

  void clear() {
    count_ = 0;
    resize(256);
  }

  int64_t id_of(uint64_t group) {
    for (int64_t slot = slot_of(group);; slot = (slot + 1) & (size_ - 1)) {
      if (slots_[slot] >= 0 && groups_[slots_[slot]] == group) return slots_[slot];
      if (slots_[slot] < 0) return add(group, slot);
    }
  }

 private:
  int64_t slot_of(uint64_t group) const {
    group = (group ^ (group >> 32)) * 0x9e3779b97f4a7c15;
    return int64_t(group >> 32) & (size_ - 1);
  }

  int64_t add(uint64_t group, int64_t slot) {
    slots_[slot] = count_;
    groups_[count_++] = group;
    if (2 * count_ == size_) grow();
    return count_ - 1;
  }

  void resize(int64_t size) {
    size_ = size;
    slots_.reserve(size);
    groups_.reserve(size / 2);
    for (int64_t i = 0; i < size; ++i) slots_[i] = -1;
  }

  void grow() {
    Buffer<uint64_t> known(count_);
    for (int64_t i = 0; i < count_; ++i) known[i] = groups_[i];
    resize(2 * size_);
    for (int64_t i = 0; i < count_; ++i) {
      groups_[i] = known[i];
      int64_t slot = slot_of(known[i]);
      while (slots_[slot] >= 0) slot = (slot + 1) & (size_ - 1);
      slots_[slot] = i;
    }
  }

  Buffer<int64_t> slots_;    // an id, or -1
  Buffer<uint64_t> groups_;  // of each id
  int64_t size_ = 0, count_ = 0;
};

}  // namespace pvk::nms::PVK_ISA
