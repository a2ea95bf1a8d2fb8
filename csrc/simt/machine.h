// The emulated device's state while a kernel runs. Internal to csrc/simt/*.cpp.
#pragma once

#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt/fiber.h"
#include "simt/host.h"
#include "simt/shadow.h"
#include "simt/simt.h"

namespace simt {

struct Block;

// One cp.async on its way.
struct Copy {
  unsigned char* target;
  const unsigned char* source;
  unsigned bytes, source_bytes;
  Site site;
  bool committed = false;
};

struct alignas(64) Thread {
  Context context;
  Block* block;
  const char* waits_for;  // what it waits at, for messages; nullptr: it can run
  Site site;
  unsigned rank;        // in its block
  uint32_t time;        // of its latest ordering event; the block's may be later
  uint32_t id;          // in the launch
  unsigned waits_mask;  // lanes, where it waits for some
  uint3 index;
  bool exited;
  bool cluster_arrived;  // at a barrier that is not complete
  bool cluster_waits;    // has arrived, and not waited since
  uint32_t* known;       // order.cpp: the times of the cluster's threads that it has learned of
  std::vector<Copy> copies;
  std::vector<unsigned> copy_groups;  // sizes of the committed groups, oldest first
};

// A warp's lanes that have come to one collective.
struct Gathering {
  const char* name;
  Site site;
  unsigned mask, arrived;
  Finish finish;
  void* operands[kWarpSize];
};

struct Warp {
  unsigned lanes;   // that exist
  unsigned exited;  // of those
  uint32_t base;    // time of the latest sync of all lanes
  std::vector<Gathering> gatherings;
};

// The lanes of a warp that have come to a barrier, which is one for all of them.
struct WarpArrival {
  unsigned lanes = 0;
  bool counted = false;  // the warp is complete, and its missing lanes are counted
  const char* name = nullptr;
  Site site;
};

struct Barrier {
  const char* name = nullptr;
  Reduce reduce = Reduce::kNone;
  Site site;
  unsigned arrived = 0, expected = 0, first_thread = 0;
  unsigned count = 0;  // of true predicates
  std::vector<Thread*> waiting;
  std::vector<uint32_t> clock;  // named barriers: what the arrived have known
  std::vector<WarpArrival> warps;
};

struct Mbarrier {
  unsigned count, pending, phase;
  std::vector<uint32_t> arrived_in;  // by thread of the cluster: 1 + the phase of its latest arrival
  std::vector<uint32_t> clock;       // of the phase under way
  std::vector<uint32_t> past_clock;  // of all completed phases
  std::vector<Thread*> waiting;
};

// Blocks that meet at a cluster's, or the grid's, barrier.
struct Meeting {
  unsigned arrived = 0, expected = 0;
  uint32_t base = 0;  // time of the latest barrier
  Site site;
  std::vector<Thread*> waiting;
  std::vector<uint32_t> fences;  // a cluster's: what those who called a fence have known
};

struct Block {
  uint3 index;
  uint32_t number;  // in the grid
  unsigned slot;    // in the cohort
  unsigned rank;    // in the cluster
  Meeting* cluster;
  Block* cluster_begin;
  unsigned alive;
  unsigned reduced;      // result of the latest __syncthreads_count and its like
  uint32_t base;         // time of the latest barrier of all its threads
  uint32_t time;         // after it
  uint32_t shared_base;  // accesses to this block's shared memory up to then precede everything that its threads do
  bool knows_more;       // some thread has learned of others since, other than by a barrier of all
  unsigned char* shared;
  Barrier barriers[kBarriers];
  std::vector<Warp> warps;
  std::vector<WarpArrival> cluster_arrivals;  // by warp
  std::vector<uint32_t> exit_clock;           // what its threads knew of the cluster when they exited
  Thread* threads;
  std::unordered_map<size_t, Mbarrier> mbarriers;  // by offset in shared memory
};

struct GlobalRange {
  uintptr_t begin = 0;
  size_t bytes = 0;
  uint64_t era = 0;  // in which the shadow began
  std::unique_ptr<Shadow> shadow = nullptr;
};

// Shared memory of a block: static variables from the front, the dynamic part at the end, gaps between.
constexpr size_t kArenaBytes = 256 * 1024;
constexpr size_t kGapBytes = 64;

struct Machine {
  std::mutex running;
  Options options;
  LaunchSpec spec;
  const void* kernel = nullptr;
  void (*body)(void*) = nullptr;
  void* parameters = nullptr;
  size_t parameter_bytes = 0;

  // The schedule: threads that can run, and those that have not begun, in the order in which they will from the back.
  std::vector<Thread*> ready;
  size_t ready_begin = 0;
  std::vector<Thread*> unstarted;
  uint64_t random = 1;
  uint64_t spins = 0;  // since something other than spinning happened
  Context main, ended;
  StackPool stacks;

  unsigned threads_of_block = 0, cohort_blocks = 0;
  std::vector<Thread> threads;
  std::vector<Block> blocks;
  std::vector<Meeting> clusters;
  Meeting grid;
  unsigned alive = 0;

  // Failure of the kernel.
  bool failed = false;
  std::string message;
  std::exception_ptr exception;

  // Memory.
  uint64_t launches = 0;
  unsigned char* arenas = nullptr;
  size_t arenas_bytes = 0;
  std::vector<SharedVariable*> shared_variables;
  size_t static_bytes = 0, static_end = 0;  // declared; of the arena, with gaps
  std::unique_ptr<Shadow> shared_shadow;
  std::vector<GlobalRange>* ranges = nullptr;  // that the launching thread has allowed
  std::vector<GlobalRange> allocations;        // of cudaMalloc
  uint64_t era = 0;                            // how often the clock has begun again

  // Time.
  uint32_t clock = 0, launch_base = 0, cohort_base = 0;
  std::vector<uint32_t> fences;                    // by block of the grid: its latest fence
  std::vector<std::vector<Readers>> more_readers;  // since readers_base
  std::vector<uint32_t> free_readers;              // lists of more_readers that no cell has
  uint32_t readers_base = 0;
  std::vector<std::unique_ptr<uint32_t[]>> known_rows;
  size_t known_columns = 0;
};

extern Machine machine;
extern thread_local Thread* current __attribute__((tls_model("initial-exec")));

// schedule.cpp
void wait_here(Thread& self, const char* what, Site site, unsigned mask = 0);  // until somebody wakes it
void wake(Thread& thread);
uint64_t random_below(uint64_t limit);

// block.cpp
void start_barriers(Block& block);
void leave_barriers(Thread& self);  // an exiting thread counts out
std::string describe_waiting();
void arrive_with_warp(Thread& self, std::vector<WarpArrival>& warps, const char* name, Site site);

// cluster.cpp
void leave_meetings(Thread& self);

// shared.cpp
void start_shared(Block& block);
bool is_in_variable(size_t offset, size_t bytes) noexcept;
struct SharedPlace {
  Block* block;
  size_t offset;
};
bool find_shared(const void* address, SharedPlace& place);  // whether it is in any arena
std::vector<std::pair<size_t, size_t>> shared_extents();    // offset and size of the variables
std::string describe_shared(const SharedPlace& place);

// memory.cpp
void observe(const void* address, size_t bytes, Access access, bool aligned, const void* code);
void start_copy(void* shared, size_t bytes, const void* code);  // marks what a cp.async will write
void land_copy(void* shared, size_t bytes);
void leave_shared(Thread& self);  // a block must outlive the others' accesses to its shared memory
std::vector<GlobalRange>& global_ranges();

// order.cpp
uint32_t time_of(const Thread& thread);
bool precedes(uint32_t thread, uint32_t time, const Thread& self);
void order_block(Block& block);
void order_warp(Block& block, Warp& warp, unsigned mask);
void order_meeting(Meeting& meeting, Block* begin, Block* end);
void release(Thread& self, std::vector<uint32_t>& clock);
void acquire(Thread& self, const std::vector<uint32_t>& clock);

// report.cpp
uint32_t place_of(const void* code);
std::string line_of(uint32_t place);
std::string line_of(Site site);
std::string kernel_name();
std::string name_of(const Thread& thread);
std::string name_of_thread(uint32_t id);
std::string short_path(const std::string& path);

}  // namespace simt
