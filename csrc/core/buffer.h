// Scratch memory of the CPU kernels: aligned, uninitialised, freed at scope's end.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/memory.h"

namespace pvk::PVK_ISA {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // Forgets what it held. Grows by doubling when asked again and again.
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    std::free(data_);
    data_ = nullptr;
    allocate(count > 2 * capacity_ ? count : 2 * capacity_);
  }

  T* data() { return data_; }
  T& operator[](int64_t index) { return data_[index]; }
  const T& operator[](int64_t index) const { return data_[index]; }

 private:
  void allocate(int64_t count) {
    capacity_ = count;
    const uint64_t bytes = (uint64_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    advise_huge_pages(data_, int64_t(bytes));
  }

  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace pvk::PVK_ISA
