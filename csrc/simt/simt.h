// The host SIMT emulator: what a kernel's code, and the stand-in CUDA headers, call of it. A CUDA thread is a fiber;
// one OS thread runs all of them, so that between two of these calls a thread has the machine for itself.
// Every call that can wait names the source line that made it. docs/simt.md has the whole picture.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "simt/vector_types.h"

namespace simt {

using Site = std::source_location;

constexpr int kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;               // of a block
constexpr unsigned kMaxGridYZ = 65535;               // gridDim.y, gridDim.z
constexpr unsigned kMaxCluster = 16;                 // blocks of a cluster
constexpr unsigned kBarriers = 16;                   // named barriers of a block; 0 is __syncthreads
constexpr unsigned kMultiprocessors = 132;           // of the device that is emulated
constexpr unsigned kThreadsOfMultiprocessor = 2048;  // resident at once
constexpr size_t kStaticSharedBytes = 48 * 1024;     // at most, and the dynamic size that needs no attribute
constexpr size_t kSharedBytes = 227 * 1024;          // of a block, static and dynamic together
constexpr size_t kReservedSharedBytes = 1024;        // that the driver takes of each resident block

// ---- indices ----

[[gnu::const]] uint3 thread_idx() noexcept;
[[gnu::const]] uint3 block_idx() noexcept;
[[gnu::const]] dim3 block_dim() noexcept;
[[gnu::const]] dim3 grid_dim() noexcept;
[[gnu::const]] int lane_id() noexcept;

// ---- failure ----

// Ends the launch: the kernel's name, block, thread and seed are added to the message.
[[noreturn]] void fail(const std::string& message);

// ---- warps ----

// Waits until every lane of `mask` has arrived with the same name, mask and site. The last one calls `finish`, which
// sees the operand that each lane passed (nullptr for lanes outside the mask) and leaves results in them.
using Finish = void (*)(void* const (&operands)[kWarpSize], unsigned mask);
void collective(const char* name, unsigned mask, void* operand, Finish finish, Site site);

// __syncwarp: the one collective that orders memory.
void sync_warp(unsigned mask, Site site);

// ---- blocks ----

enum class Reduce { kNone, kCount, kAnd, kOr };

// __syncthreads, and its forms that reduce a predicate. Threads that exited do not count.
unsigned sync_threads(const char* name, Reduce reduce, bool predicate, Site site);

// bar.sync and bar.arrive: barrier `id` completes when `threads` threads (a multiple of 32) have come.
void barrier_sync(unsigned id, unsigned threads, Site site);
void barrier_arrive(unsigned id, unsigned threads, Site site);

// ---- clusters and grids ----

unsigned cluster_rank() noexcept;  // of this block in its cluster
unsigned cluster_size() noexcept;
void cluster_arrive(Site site);
void cluster_wait(Site site);
void* map_shared(const void* shared, unsigned rank, Site site);  // the same variable of another block
void grid_sync(Site site);                                       // cooperative launches only

// ---- memory ----

enum class Access : uint8_t { kRead, kWrite, kAtomicRead, kAtomicWrite };

// What the compiler's hooks do for plain loads and stores; the stand-in headers call it for what is not one (atomics,
// ldmatrix). Checks alignment, bounds, initialisation and races. `bytes` is a power of two, at most 16.
void check_access(const void* address, size_t bytes, Access access);
bool is_shared(const void* address) noexcept;

void fence();              // __threadfence and weaker
void progress() noexcept;  // memory has changed: this is no livelock
void spin();               // lets the others run: each turn of a loop that waits for memory to change

// cp.async of 4, 8 or 16 bytes, of which `source_bytes` are read and the rest is zero; lands at its wait.
void cp_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site);
void cp_async_commit();
void cp_async_wait(unsigned groups_left);  // all but the latest `groups_left` committed groups have landed
void cp_async_wait_all();                  // committed or not

// mbarrier: a 64-bit word in shared memory.
void mbarrier_init(uint64_t* barrier, unsigned count, Site site);
void mbarrier_invalidate(uint64_t* barrier, Site site);
void mbarrier_arrive(uint64_t* barrier, unsigned count, Site site);  // also on a mapped address of the cluster
bool mbarrier_test(uint64_t* barrier, unsigned parity, Site site);   // whether the phase of this parity is over
void mbarrier_wait(uint64_t* barrier, unsigned parity, Site site);

// A static shared variable: its address is the same offset in every block of a launch.
struct SharedVariable {
  size_t bytes, alignment;
  const char* name;
  Site site;
  uint64_t launch = 0;  // the launch in which it got its offset
  size_t offset = 0;
};
void* shared_address(SharedVariable& variable);
void* dynamic_shared_address() noexcept;

#define SIMT_SHARED(type, name)                                                                                 \
  static ::simt::SharedVariable simt_shared_##name{                                                             \
      sizeof(std::type_identity_t<type>), alignof(std::type_identity_t<type>), #name, ::simt::Site::current()}; \
  auto& name = *static_cast<std::type_identity_t<type>*>(::simt::shared_address(simt_shared_##name))
#define SIMT_DYN_SHARED(type, name) type* const name = static_cast<type*>(::simt::dynamic_shared_address())

// For wrappers in headers: the line of their caller. Empty in a CUDA build.
#define SIMT_ONLY_SITE ::simt::Site simt_site = ::simt::Site::current()
#define SIMT_SITE , SIMT_ONLY_SITE
#define SIMT_AT_SITE , simt_site

}  // namespace simt
