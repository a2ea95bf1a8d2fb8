// The race detector's memory: for every byte who wrote it last, and who has read it since.
//
// Time is one counter a process: every event that orders threads (a barrier, a warp sync, an arrival) advances it. An
// access is stamped with its thread's time, and two accesses are ordered when the later thread knows of the earlier
// one's stamp (order.cpp). Stamps of finished blocks and launches are in the past of everything: nothing is cleared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

// Lanes of one warp that read, or updated by an atomic, at one time.
struct Readers {
  uint32_t time = 0;
  uint32_t lanes = 0;
  uint32_t place = 0;  // in the code, of the latest of them
  uint32_t warp : 30 = 0;
  uint32_t atomic : 1 = 0;
  uint32_t wrote : 1 = 0;
};

// The history of a word, or of a byte where a word is not accessed as a whole.
struct Cell {
  uint32_t write_time = 0;
  uint32_t write_place = 0;
  uint32_t writer : 30 = 0;  // thread of the launch
  uint32_t atomic : 1 = 0;
  uint32_t pending : 1 = 0;  // a cp.async that nobody has waited for
  uint32_t more : 31 = 0;    // 1 + the index of further readers
  uint32_t updated : 1 = 0;  // some of the readers are atomic writers that came after a plain write
  Readers readers;
};

constexpr uint32_t kMaxDetectedThreads = 1u << 30;

// The cells of a stretch of memory. Pages that are never touched cost nothing.
class Shadow {
 public:
  explicit Shadow(size_t bytes);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  Cell& word(size_t offset) { return words_[offset / 4]; }
  Cell& byte(size_t offset) { return bytes_[offset]; }
  // Whether the word's history is kept by bytes since this launch.
  uint32_t& split_in(size_t offset) { return split_[offset / 4]; }

 private:
  size_t size_;
  Cell *words_, *bytes_;
  uint32_t* split_;
};

}  // namespace simt
