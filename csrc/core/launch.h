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

// A number of blocks along x.
inline unsigned grid_of(const char* op, int64_t blocks) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  if (blocks > kMost)
    throw std::runtime_error(std::string(op) + ": expected at most " + std::to_string(kMost) + " blocks, but got " +
                             std::to_string(blocks));
  return unsigned(blocks);
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic shared memory
  Stream stream = nullptr;
  unsigned cluster = 1;      // blocks along x that share their shared memory
  bool cooperative = false;  // all blocks are resident at once, so that grid_sync() works
};

inline std::string to_string(const dim3& d) {
  return std::string("[") + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
}

inline std::string to_string(const LaunchConfig& config) {
  std::string text = "launch with grid " + to_string(config.grid) + ", block " + to_string(config.block) + " and " +
                     std::to_string(config.shared_bytes) + " bytes of shared memory";
  if (config.cluster != 1) text += ", in clusters of " + std::to_string(config.cluster);
  if (config.cooperative) text += ", cooperative";
  return text;
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  constexpr unsigned kPortableCluster = 8;
  const auto check = [&](cudaError_t status) {
    if (status != cudaSuccess) check_cuda(status, to_string(config));
  };
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (config.shared_bytes > 0) {  // without it, static and dynamic together are held to 48 KB
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.shared_bytes)));
  }
  if (config.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (config.cluster != 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  const cudaLaunchConfig_t launch_config = {
      config.grid, config.block, config.shared_bytes, cuda_stream(config.stream), attributes, count,
  };
  check(cudaLaunchKernelEx(&launch_config, kernel, std::forward<Args>(args)...));
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
