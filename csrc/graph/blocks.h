// Memory of the maps within a graph. A thread keeps what its last call used, so that the next one finds it mapped and
// in cache: maps fresh from the system cost a page fault every 4 KB.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "core/memory.h"

namespace pvk::graph {

class Blocks {
 public:
  using Block = std::shared_ptr<void>;

  // What is not used again until the end of a scope is given back to the system.
  class Scope {
   public:
    explicit Scope(Blocks& blocks) : blocks_(blocks) { ++blocks_.call_; }
    ~Scope() { blocks_.forget_unused(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Blocks& blocks_;
  };

  Blocks() = default;
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  ~Blocks() { free_all(); }

  static Blocks& of_thread() {
    static thread_local Blocks blocks;
    return blocks;
  }

  // The smallest free block that fits and is not twice as large, of these the last one freed; else a new one.
  Block acquire(int64_t bytes) {
    bytes = (bytes < kAlignment ? kAlignment : bytes + kAlignment - 1) / kAlignment * kAlignment;
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i)
      if (free_[i].bytes >= bytes && free_[i].bytes <= 2 * bytes &&
          (best == free_.size() || free_[i].bytes <= free_[best].bytes))
        best = i;
    Memory memory{nullptr, bytes, call_};
    if (best < free_.size()) {
      memory = free_[best];
      memory.call = call_;
      free_.erase(free_.begin() + int64_t(best));
    } else {
      memory.data = std::aligned_alloc(kAlignment, uint64_t(bytes));
      if (memory.data == nullptr) throw std::bad_alloc();
      advise_huge_pages(memory.data, bytes);
    }
    return Block(memory.data, [this, memory](void*) { free_.push_back(memory); });
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kMost = int64_t(1) << 28;  // bytes that a thread keeps

  struct Memory {
    void* data;
    int64_t bytes, call;
  };

  void forget_unused() {
    int64_t kept = 0;
    std::vector<Memory> still;
    for (const Memory& memory : free_) {
      kept += memory.bytes;
      if (memory.call == call_ && kept <= kMost) {
        still.push_back(memory);
      } else {
        std::free(memory.data);
      }
    }
    free_.swap(still);
  }

  void free_all() {
    for (const Memory& memory : free_) std::free(memory.data);
    free_.clear();
  }

  std::vector<Memory> free_;
  int64_t call_ = 0;
};

}  // namespace pvk::graph
