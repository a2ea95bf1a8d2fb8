// Each thread keeps what was released last, at most kMost bytes; the oldest goes back to the system first.
#include "core/scratch.h"

#include <cstdlib>
#include <new>

#include "core/memory.h"

namespace pvk {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kSmall = 4096;  // bytes: malloc keeps smaller ones itself
constexpr int64_t kMost = int64_t(128) << 20;
constexpr int kBlocks = 32;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;  // a block would hide what is beyond its part in use
#else
constexpr bool kKeeps = true;
#endif

// In front of the memory.
struct alignas(kAlignment) Header {
  int64_t capacity;
};

class Kept {
 public:
  ~Kept() {
    while (count_ > 0) drop(0);
  }

  // The smallest that fits and is not twice as large, of these the last one released; or null.
  Header* take(int64_t bytes) {
    int best = -1;
    for (int i = 0; i < count_; ++i) {
      const int64_t capacity = blocks_[i]->capacity;
      if (capacity >= bytes && capacity <= 2 * bytes && (best < 0 || capacity <= blocks_[best]->capacity)) best = i;
    }
    if (best < 0) return nullptr;
    Header* const block = blocks_[best];
    remove(best);
    return block;
  }

  void keep(Header* block) {
    if (block->capacity > kMost) return std::free(block);
    while (count_ == kBlocks || bytes_ + block->capacity > kMost) drop(0);
    blocks_[count_++] = block;
    bytes_ += block->capacity;
  }

 private:
  void remove(int i) {
    bytes_ -= blocks_[i]->capacity;
    --count_;
    for (; i < count_; ++i) blocks_[i] = blocks_[i + 1];
  }

  void drop(int i) {
    Header* const block = blocks_[i];
    remove(i);
    std::free(block);
  }

  Header* blocks_[kBlocks];  // the oldest first
  int count_ = 0;
  int64_t bytes_ = 0;
};

thread_local Kept kept;

}  // namespace

void* acquire_scratch(int64_t bytes) {
  if (bytes < 0 || bytes > INT64_MAX / 4) throw std::bad_alloc();
  const int64_t capacity = (bytes + kAlignment) / kAlignment * kAlignment;
  Header* block = kKeeps && bytes >= kSmall ? kept.take(capacity) : nullptr;
  if (block == nullptr) {
    block = static_cast<Header*>(std::aligned_alloc(kAlignment, sizeof(Header) + uint64_t(capacity)));
    if (block == nullptr) throw std::bad_alloc();
    block->capacity = capacity;
    advise_huge_pages(block, capacity);
  }
  return block + 1;
}

void release_scratch(void* data, int64_t bytes) {
  if (data == nullptr) return;
  Header* const block = static_cast<Header*>(data) - 1;
  if (kKeeps && bytes >= kSmall) return kept.keep(block);
  std::free(block);
}

}  // namespace pvk
