// Scratch memory of the CPU kernels: aligned, uninitialised, released at scope's end.
#pragma once

#include <cstdint>

#include "core/scratch.h"

namespace pvk::PVK_ISA {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // Forgets what it held. Grows by doubling when asked again and again.
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    const int64_t grown = count > 2 * capacity_ ? count : 2 * capacity_;
    release();
    data_ = nullptr;
    capacity_ = 0;
    allocate(grown);
  }

  T* data() { return data_; }
  T& operator[](int64_t index) { return data_[index]; }
  const T& operator[](int64_t index) const { return data_[index]; }

 private:
  void allocate(int64_t count) {
    data_ = static_cast<T*>(acquire_scratch(count * int64_t(sizeof(T))));
    capacity_ = count;
  }
  void release() { release_scratch(data_, capacity_ * int64_t(sizeof(T))); }

  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace pvk::PVK_ISA
