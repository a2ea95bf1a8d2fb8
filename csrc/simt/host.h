// The host's side of the emulator: launches, what a schedule is made of, and which memory a kernel may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "simt/vector_types.h"

namespace simt {

struct Options {
  uint64_t seed = 0;          // of the schedule; 0 runs threads in order
  bool races = true;          // look for races on shared memory
  bool global_races = false;  // and on global memory
};
void set_options(const Options& options);
Options options();

// Memory that kernels may touch, beside shared memory, their stack and constants; all else is out of bounds. What an OS
// thread allows is for its own launches, until the scope in which it did ends.
class GlobalScope {
 public:
  GlobalScope();
  ~GlobalScope();
  GlobalScope(const GlobalScope&) = delete;
  GlobalScope& operator=(const GlobalScope&) = delete;

 private:
  size_t count_;
};
void allow_global(const void* begin, size_t bytes);

// cudaMalloc's and cudaFree's, for all launches.
void add_allocation(const void* begin, size_t bytes);
void remove_allocation(const void* begin);

struct LaunchSpec {
  dim3 grid, block;
  unsigned cluster = 1;  // blocks along x
  size_t dynamic_shared_bytes = 0;
  size_t shared_bytes_limit = 0;  // of a block, static and dynamic together
  bool cooperative = false;
};

// Runs `body(parameters)` as each thread of the grid, which the device would not refuse. Throws std::runtime_error
// where the kernel is wrong. `kernel` is the kernel's address, for its name; `parameters` is where its arguments are
// kept.
void run(const LaunchSpec& spec, const void* kernel, void (*body)(void*), void* parameters, size_t parameter_bytes);

}  // namespace simt
