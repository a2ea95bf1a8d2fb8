// The host's side of the runtime API. Errors and reasons are of the OS thread, as in CUDA.
#include "simt/runtime_api.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "simt/simt.h"

namespace {

constexpr unsigned kPortableCluster = 8;
constexpr int kBlocksOfMultiprocessor = 32;
constexpr size_t kSharedBytesOfMultiprocessor = simt::kSharedBytes + simt::kReservedSharedBytes;
constexpr size_t kMallocAlignment = 256;

struct Error {
  cudaError_t last = cudaSuccess;
  cudaError_t explained = cudaSuccess;  // the error that `text` is about
  std::string text;
};
thread_local Error error;

struct KernelAttributes {
  size_t dynamic_shared_bytes = simt::kStaticSharedBytes;
  size_t shared_bytes = simt::kStaticSharedBytes;  // static and dynamic together
  bool non_portable_cluster = false;
};

std::mutex mutex;  // of what follows
std::unordered_map<const void*, KernelAttributes> attributes;
std::unordered_set<void*> allocations;

KernelAttributes attributes_of(const void* kernel) {
  const std::lock_guard lock(mutex);
  const auto found = attributes.find(kernel);
  return found == attributes.end() ? KernelAttributes{} : found->second;
}

const char* words_of(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}

cudaError_t report(cudaError_t code, const std::string& reason) {
  error.last = error.explained = code;
  error.text = std::string(words_of(code)) + ": " + reason;
  return code;
}

// Static shared memory is left out: it is known only once a kernel runs.
int resident_blocks(unsigned threads, size_t dynamic_shared_bytes) {
  if (threads == 0 || threads > simt::kMaxThreads) return 0;
  const unsigned warps = (threads + simt::kWarpSize - 1) / simt::kWarpSize;
  const int by_threads = int(simt::kThreadsOfMultiprocessor / (warps * simt::kWarpSize));
  const int by_shared = int(kSharedBytesOfMultiprocessor / (dynamic_shared_bytes + simt::kReservedSharedBytes));
  return std::min({by_threads, by_shared, kBlocksOfMultiprocessor});
}

int resident_blocks(const simt::LaunchSpec& spec) {
  const uint64_t threads = uint64_t(spec.block.x) * spec.block.y * spec.block.z;
  return resident_blocks(unsigned(std::min<uint64_t>(threads, UINT32_MAX)), spec.dynamic_shared_bytes);
}

// Why the device would refuse the launch, or nothing.
std::string refuse_launch(const simt::LaunchSpec& spec, const KernelAttributes& allowed) {
  using namespace simt;
  const auto count = [](uint64_t n, const char* what) { return std::to_string(n) + what; };
  const dim3 &grid = spec.grid, &block = spec.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "the grid is empty";
  if (threads == 0) return "the block is empty";
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || threads > kMaxThreads)
    return count(threads, " threads a block, but at most 1024 (and 64 along z) are allowed");
  if (grid.x > 2147483647u) return count(grid.x, " blocks along x, but at most 2147483647 are allowed");
  if (grid.y > kMaxGridYZ) return count(grid.y, " blocks along y, but at most 65535 are allowed");
  if (grid.z > kMaxGridYZ) return count(grid.z, " blocks along z, but at most 65535 are allowed");
  if (spec.dynamic_shared_bytes > kSharedBytes)
    return count(spec.dynamic_shared_bytes, " bytes of dynamic shared memory, but at most 232448 are there");
  if (spec.dynamic_shared_bytes > allowed.dynamic_shared_bytes)
    return count(spec.dynamic_shared_bytes, " bytes of dynamic shared memory, but the kernel is allowed ") +
           std::to_string(allowed.dynamic_shared_bytes);
  if (spec.cluster == 0 || spec.cluster > kMaxCluster)
    return count(spec.cluster, " blocks a cluster, but 1 to 16 are allowed");
  if (grid.x % spec.cluster != 0)
    return count(grid.x, " blocks along x, which are no whole number of clusters of ") + std::to_string(spec.cluster);
  if (spec.cluster > kPortableCluster && !allowed.non_portable_cluster)
    return count(spec.cluster,
                 " blocks a cluster, but at most 8 are allowed without "
                 "cudaFuncAttributeNonPortableClusterSizeAllowed");
  return {};
}

cudaError_t translate(const cudaLaunchConfig_t& config, simt::LaunchSpec& spec) {
  spec = {config.simt_grid, config.simt_block, 1, config.dynamicSmemBytes, 0, false};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeCooperative:
        spec.cooperative = value.cooperative != 0;
        break;
      case cudaLaunchAttributeClusterDimension:
        if (value.clusterDim.y != 1 || value.clusterDim.z != 1) {
          return report(cudaErrorNotSupported, "the emulator has clusters along x only");
        }
        spec.cluster = value.clusterDim.x;
        break;
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributeProgrammaticStreamSerialization:
      case cudaLaunchAttributePriority:
        break;
      default:
        return report(cudaErrorNotSupported, "launch attribute " + std::to_string(int(config.attrs[i].id)));
    }
  }
  return cudaSuccess;
}

}  // namespace

namespace simt {

cudaError_t prepare_launch(const cudaLaunchConfig_t& config, const void* kernel, LaunchSpec& spec) {
  const cudaError_t status = translate(config, spec);
  if (status != cudaSuccess) return status;
  const KernelAttributes allowed = attributes_of(kernel);
  const std::string reason = refuse_launch(spec, allowed);
  if (!reason.empty()) return report(cudaErrorInvalidConfiguration, reason);
  spec.shared_bytes_limit = allowed.shared_bytes;
  if (!spec.cooperative) return cudaSuccess;

  const uint64_t blocks = uint64_t(spec.grid.x) * spec.grid.y * spec.grid.z;
  const uint64_t resident = uint64_t(resident_blocks(spec)) * kMultiprocessors;
  if (blocks > resident) {
    return report(cudaErrorCooperativeLaunchTooLarge,
                  std::to_string(blocks) + " blocks, of which " + std::to_string(resident) + " are resident at once");
  }
  return cudaSuccess;
}

cudaError_t count_resident_blocks(int* blocks, const void* kernel, int threads, size_t dynamic_shared_bytes) {
  const bool fits = dynamic_shared_bytes <= attributes_of(kernel).dynamic_shared_bytes;
  *blocks = threads > 0 && fits ? resident_blocks(unsigned(threads), dynamic_shared_bytes) : 0;
  return cudaSuccess;
}

cudaError_t count_resident_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  LaunchSpec spec;
  *clusters = 0;
  const cudaError_t status = translate(config, spec);
  if (status != cudaSuccess || spec.cluster == 0) return status;
  const KernelAttributes allowed = attributes_of(kernel);
  if (spec.dynamic_shared_bytes > allowed.dynamic_shared_bytes) return cudaSuccess;
  if (spec.cluster > (allowed.non_portable_cluster ? kMaxCluster : kPortableCluster)) return cudaSuccess;
  *clusters = resident_blocks(spec) * int(kMultiprocessors) / int(spec.cluster);
  return cudaSuccess;
}

}  // namespace simt

cudaError_t cudaGetLastError() {
  return std::exchange(error.last, cudaSuccess);
}
cudaError_t cudaPeekAtLastError() {
  return error.last;
}

const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
#define SIMT_NAME(name) \
  case name:            \
    return #name
    SIMT_NAME(cudaSuccess);
    SIMT_NAME(cudaErrorInvalidValue);
    SIMT_NAME(cudaErrorMemoryAllocation);
    SIMT_NAME(cudaErrorInvalidConfiguration);
    SIMT_NAME(cudaErrorInvalidDevice);
    SIMT_NAME(cudaErrorCooperativeLaunchTooLarge);
    SIMT_NAME(cudaErrorNotSupported);
#undef SIMT_NAME
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t code) {
  return code != cudaSuccess && code == error.explained ? error.text.c_str() : words_of(code);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : report(cudaErrorInvalidDevice, std::to_string(device) + ", there is only 0");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return report(cudaErrorInvalidDevice, std::to_string(device) + ", there is only 0");
  const auto give = [&](size_t what) {
    *value = int(what);
    return cudaSuccess;
  };
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return give(simt::kMaxThreads);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return give(simt::kStaticSharedBytes);
    case cudaDevAttrWarpSize:
      return give(simt::kWarpSize);
    case cudaDevAttrMultiProcessorCount:
      return give(simt::kMultiprocessors);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return give(simt::kThreadsOfMultiprocessor);
    case cudaDevAttrComputeCapabilityMajor:
      return give(9);
    case cudaDevAttrComputeCapabilityMinor:
      return give(0);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return give(kSharedBytesOfMultiprocessor);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return give(simt::kSharedBytes);
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return give(kBlocksOfMultiprocessor);
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return give(simt::kReservedSharedBytes);
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch:
      return give(1);
  }
  return report(cudaErrorInvalidValue, "device attribute " + std::to_string(int(attribute)));
}

cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  const size_t whole = (bytes + kMallocAlignment - 1) / kMallocAlignment * kMallocAlignment;
  void* const memory = whole < bytes ? nullptr : std::aligned_alloc(kMallocAlignment, whole);
  if (memory == nullptr) return report(cudaErrorMemoryAllocation, std::to_string(bytes) + " bytes");
  std::memset(memory, 0xFF, whole);
  simt::add_allocation(memory, bytes);
  const std::lock_guard lock(mutex);
  allocations.insert(memory);
  *address = memory;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (address == nullptr) return cudaSuccess;
  const std::lock_guard lock(mutex);
  if (allocations.erase(address) == 0) return report(cudaErrorInvalidValue, "cudaMalloc did not return this address");
  simt::remove_allocation(address);
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  if (bytes > 0) std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(address, value, bytes);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(mutex);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || size_t(value) > simt::kSharedBytes) {
        return report(cudaErrorInvalidValue, std::to_string(value) + " bytes of dynamic shared memory, at most " +
                                                 std::to_string(simt::kSharedBytes));
      }
      attributes[kernel].dynamic_shared_bytes = size_t(value);
      attributes[kernel].shared_bytes = simt::kSharedBytes;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      attributes[kernel].non_portable_cluster = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue, "kernel attribute " + std::to_string(int(attribute)));
}

long long clock64() {
  static std::atomic<long long> clock = 0;
  return ++clock;
}
