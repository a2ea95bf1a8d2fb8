// What the files beside this one share: arrays on the device, and errors as text.
#pragma once

#include <exception>
#include <string>

#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"

// A function that Python calls: nullptr, or what went wrong.
#define SELFTEST extern "C" __attribute__((visibility("default"))) const char*

namespace selftest {

template <typename T>
class DeviceArray {
 public:
  // Bytes of 0xff, which are NaN as floats.
  explicit DeviceArray(size_t count) : count_(count) {
    PVK_CUDA_CHECK(cudaMalloc(&data_, bytes()));
    PVK_CUDA_CHECK(cudaMemset(data_, 0xff, bytes()));
  }
  DeviceArray(const void* host, size_t count) : count_(count) {
    PVK_CUDA_CHECK(cudaMalloc(&data_, bytes()));
    PVK_CUDA_CHECK(cudaMemcpy(data_, host, bytes(), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  void clear() { PVK_CUDA_CHECK(cudaMemset(data_, 0, bytes())); }
  void copy_to(void* host) const { PVK_CUDA_CHECK(cudaMemcpy(host, data_, bytes(), cudaMemcpyDeviceToHost)); }

 private:
  size_t bytes() const { return count_ * sizeof(T); }

  T* data_ = nullptr;
  size_t count_;
};

// Until this OS thread's next error.
inline const char* keep(const char* what) {
  static thread_local std::string message;
  message = what;
  return message.c_str();
}

template <typename Body>
const char* catch_error(const Body& body) {
  try {
    body();
    PVK_CUDA_CHECK(cudaDeviceSynchronize());
    return nullptr;
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}

constexpr int kCount = 64;

// What the kernels of wrong.cu and legal.cu get.
inline const char* run_on_zeros(void (*kernel)(float*, int), const pvk::LaunchConfig& config) {
  return catch_error([&] {
    DeviceArray<float> data(kCount);
    data.clear();
    pvk::launch(kernel, config, data.data(), kCount);
  });
}

inline pvk::LaunchConfig threads(unsigned x, unsigned y = 1, unsigned z = 1) {
  return {dim3(1), dim3(x, y, z)};
}
inline pvk::LaunchConfig blocks(unsigned x, unsigned y = 1, unsigned z = 1) {
  return {dim3(x, y, z), dim3(kCount)};
}
inline pvk::LaunchConfig dynamic_shared(size_t bytes) {
  return {dim3(1), dim3(kCount), bytes};
}
inline pvk::LaunchConfig clusters(unsigned grid, unsigned cluster) {
  return {dim3(grid), dim3(kCount), 0, nullptr, cluster};
}
inline pvk::LaunchConfig cooperative(unsigned grid, unsigned block_threads = kCount) {
  return {dim3(grid), dim3(block_threads), 0, nullptr, 1, true};
}

}  // namespace selftest
