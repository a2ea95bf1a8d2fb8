// The one place that launches kernels and calls the CUDA runtime. Every failure throws std::runtime_error with the
// runtime's own words.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/types.h"

#define PVK_CUDA_CHECK(call) ::pvk::check_cuda((call), #call)

namespace pvk {

inline void check_cuda(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leaves no stale error for the next caller; a sticky one stays
  throw std::runtime_error("CUDA: " + what + " failed: " + cudaGetErrorString(status));
}

inline cudaStream_t cuda_stream(Stream stream) {
  return static_cast<cudaStream_t>(stream);
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic shared memory
  Stream stream = nullptr;
};

inline std::string to_string(const dim3& d) {
  return std::string("[") + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (config.shared_bytes > kDefaultSharedBytes) {
    PVK_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.shared_bytes)));
  }
  const cudaLaunchConfig_t launch_config = {
      config.grid, config.block, config.shared_bytes, cuda_stream(config.stream), nullptr, 0};
  const cudaError_t status = cudaLaunchKernelEx(&launch_config, kernel, std::forward<Args>(args)...);
  if (status == cudaSuccess) return;
  check_cuda(status, "launch with grid " + to_string(config.grid) + ", block " + to_string(config.block) + " and " +
                         std::to_string(config.shared_bytes) + " bytes of shared memory");
}

// One value from the device. Waits for the stream.
template <typename T>
T read_back(const T* device, Stream stream) {
  T value;
  PVK_CUDA_CHECK(cudaMemcpyAsync(&value, device, sizeof(T), cudaMemcpyDeviceToHost, cuda_stream(stream)));
  PVK_CUDA_CHECK(cudaStreamSynchronize(cuda_stream(stream)));
  return value;
}

}  // namespace pvk
