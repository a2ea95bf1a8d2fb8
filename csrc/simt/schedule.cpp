// Launches, and the schedule: which thread goes on when one waits.
//
// The blocks that are alive at once (one, a cluster, or the grid of a cooperative launch) are a cohort. Threads that
// can run are chosen at random by a seed. A fiber starts one thread after another until one of them has to wait; only
// then is another stack taken.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "simt/machine.h"

namespace simt {

Machine machine;
thread_local Thread* current = nullptr;

namespace {

constexpr uint64_t kMaxSpins = 5'000'000;  // of all threads together, while nothing else happens

constexpr uint32_t kLatestStart = 3u << 30;  // of a launch, on the clock

// What a seed stands for.
enum class Order { kInOrder, kRandom, kLatestFirst };
Order order_of(uint64_t seed) {
  return seed == 0 ? Order::kInOrder : seed % 3 == 0 ? Order::kLatestFirst : Order::kRandom;
}

uint64_t next_random() {
  uint64_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x * 0x2545f4914f6cdd1d;
}

size_t ready_count() {
  return machine.ready.size() - machine.ready_begin;
}

Thread* take_ready(size_t index) {
  auto& ready = machine.ready;
  Thread* const thread = ready[machine.ready_begin + index];
  if (index == 0) {
    ++machine.ready_begin;
  } else {
    ready[machine.ready_begin + index] = ready.back();
    ready.pop_back();
  }
  if (machine.ready_begin == ready.size()) {
    ready.clear();
    machine.ready_begin = 0;
  }
  return thread;
}

// The thread that goes on; nullptr: one that has not begun.
Thread* choose() {
  const size_t ready = ready_count(), unstarted = machine.unstarted.size();
  switch (order_of(machine.options.seed)) {
    case Order::kInOrder:
      return unstarted ? nullptr : take_ready(0);
    case Order::kLatestFirst:
      // Where all that can run only spin, another one has to begin.
      return ready && (unstarted == 0 || machine.spins <= ready) ? take_ready(ready - 1) : nullptr;
    case Order::kRandom:
      break;
  }
  const uint64_t pick = random_below(ready + unstarted);
  return pick < ready ? take_ready(pick) : nullptr;
}

Thread& begin_thread(const char* stack) {
  Thread& thread = *machine.unstarted.back();
  machine.unstarted.pop_back();
  thread.context.stack_low = stack;
  return thread;
}

void leave_kernel(bool fiber_ends) {
  current = nullptr;
  switch_context(machine.ended, machine.main, fiber_ends);
}

[[noreturn]] void refuse_local_memory() {
  fail("the thread's local memory exceeds the " + std::to_string(kStackBytes / 1024) + " KB of its stack");
}

void end_thread(Thread& self) {
  if (machine.stacks.overflowed(static_cast<const char*>(self.context.stack_low))) refuse_local_memory();
  if (!self.copies.empty()) {
    fail("the thread exits with " + std::to_string(self.copies.size()) +
         " cp.async copies that it has not waited for; the first was issued at " + line_of(self.copies[0].site));
  }
  machine.spins = 0;
  --machine.alive;
  leave_barriers(self);
  leave_shared(self);
  leave_meetings(self);
}

// The life of a fiber.
void work() {
  arrive_in_context(current->context);
  const char* const stack = static_cast<const char*>(current->context.stack_low);
  for (;;) {
    try {
      machine.body(machine.parameters);
    } catch (...) {
      machine.exception = std::current_exception();
    }
    if (machine.exception) {
      machine.failed = true;
      leave_kernel(true);
    }
    end_thread(*current);
    if (ready_count() + machine.unstarted.size() == 0) {
      if (machine.alive > 0) fail("deadlock: " + describe_waiting());
      machine.stacks.give(const_cast<char*>(stack));
      leave_kernel(true);
    }
    Thread* const next = choose();
    if (next != nullptr) {
      machine.stacks.give(const_cast<char*>(stack));
      current = next;
      switch_context(machine.ended, next->context, true);
    }
    current = &begin_thread(stack);
  }
}

void go_on(Thread& self) {
  if (ready_count() + machine.unstarted.size() == 0) fail("deadlock: " + describe_waiting());
  Thread* next = choose();
  if (next == &self) return;
  if (next == nullptr) {
    char* const stack = machine.stacks.take();
    next = &begin_thread(stack);
    make_context(next->context, stack, work);
  }
  current = next;
  switch_context(self.context, next->context);
}

// While kernels run, a fault just below a fiber's stack fails the launch instead of ending the process.
class OverflowHandler {
 public:
  OverflowHandler() {
#if !defined(SIMT_ASAN)
    constexpr size_t kBytes = 64 * 1024;  // a message is made on it
    static thread_local const std::unique_ptr<char[]> memory(new char[kBytes]);
    const stack_t own = {memory.get(), 0, kBytes};
    sigaltstack(&own, &before_stack_);
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before_[i]);
#endif
  }
  ~OverflowHandler() {
#if !defined(SIMT_ASAN)
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&before_stack_, nullptr);
#endif
  }
  OverflowHandler(const OverflowHandler&) = delete;
  OverflowHandler& operator=(const OverflowHandler&) = delete;

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS};
  static inline struct sigaction before_[2];
  stack_t before_stack_{};

  static void handle(int signal, siginfo_t* info, void*) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (current != nullptr && address - reinterpret_cast<uintptr_t>(current->context.stack_low) < kStackBytes)
      refuse_local_memory();
    // Somebody else's: happens again when this returns.
    sigaction(signal, &before_[signal == SIGSEGV ? 0 : 1], nullptr);
  }
};

// Visits 0 .. count - 1 in an order of the seed, without a list.
class BlockOrder {
 public:
  explicit BlockOrder(uint64_t count) : count_(count) {
    if (machine.options.seed == 0 || count < 2) return;
    next_ = random_below(count);
    do {
      step_ = 1 + random_below(count - 1);
    } while (std::gcd(step_, count) != 1);
  }
  uint64_t next() {
    const uint64_t result = next_;
    next_ = (next_ + step_) % count_;
    return result;
  }

 private:
  uint64_t count_, next_ = 0, step_ = 1;
};

void start_thread(Thread& thread, Block& block, unsigned rank) {
  const dim3& size = machine.spec.block;
  thread.block = &block;
  thread.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
  thread.id = uint32_t(uint64_t(block.number) * machine.threads_of_block + rank);
  thread.rank = rank;
  thread.time = machine.clock;
  thread.exited = thread.cluster_arrived = thread.cluster_waits = false;
  thread.waits_for = nullptr;
  thread.known = nullptr;
}

void start_block(unsigned slot, uint64_t number) {
  const LaunchSpec& spec = machine.spec;
  Block& block = machine.blocks[slot];
  block.index = {unsigned(number % spec.grid.x), unsigned(number / spec.grid.x % spec.grid.y),
                 unsigned(number / (uint64_t(spec.grid.x) * spec.grid.y))};
  block.number = uint32_t(number);
  block.slot = slot;
  block.rank = slot % spec.cluster;
  block.cluster = &machine.clusters[slot / spec.cluster];
  block.cluster_begin = &machine.blocks[slot - block.rank];
  block.alive = machine.threads_of_block;
  block.base = block.shared_base = machine.cohort_base;
  block.time = machine.clock;
  block.knows_more = false;
  block.threads = &machine.threads[size_t(slot) * machine.threads_of_block];
  block.mbarriers.clear();
  block.exit_clock.clear();
  start_barriers(block);
  start_shared(block);
  for (unsigned rank = 0; rank < machine.threads_of_block; ++rank) start_thread(block.threads[rank], block, rank);
}

// The order in which the cohort's threads begin, from the back.
void order_threads() {
  auto& unstarted = machine.unstarted;
  const size_t count = size_t(machine.cohort_blocks) * machine.threads_of_block;
  unstarted.resize(count);
  for (size_t i = 0; i < count; ++i) unstarted[i] = &machine.threads[count - 1 - i];
  if (machine.options.seed == 0) return;
  for (size_t i = count; i-- > 1;) std::swap(unstarted[i], unstarted[random_below(i + 1)]);
}

void run_cohort() {
  order_threads();
  machine.alive = unsigned(machine.unstarted.size());
  machine.spins = 0;
  char* const stack = machine.stacks.take();
  Thread& first = begin_thread(stack);
  make_context(first.context, stack, work);
  current = &first;
  switch_context(machine.main, first.context);
}

void reserve_cohort(const LaunchSpec& spec, uint64_t blocks) {
  machine.threads_of_block = spec.block.x * spec.block.y * spec.block.z;
  machine.cohort_blocks = spec.cooperative ? unsigned(blocks) : spec.cluster;
  const unsigned clusters = machine.cohort_blocks / spec.cluster;
  if (machine.blocks.size() < machine.cohort_blocks) machine.blocks = std::vector<Block>(machine.cohort_blocks);
  const size_t threads = size_t(machine.cohort_blocks) * machine.threads_of_block;
  if (machine.threads.size() < threads) machine.threads = std::vector<Thread>(threads);
  machine.clusters.assign(clusters, {});
  for (Meeting& meeting : machine.clusters) meeting.expected = spec.cluster * machine.threads_of_block;
  machine.grid = {};
  machine.grid.expected = unsigned(threads);

  const size_t bytes = machine.cohort_blocks * kArenaBytes;
  if (bytes > machine.arenas_bytes) {
    if (machine.arenas != nullptr) munmap(machine.arenas, machine.arenas_bytes);
    void* const pages =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    machine.arenas = static_cast<unsigned char*>(pages);
    machine.arenas_bytes = bytes;
    machine.shared_shadow = std::make_unique<Shadow>(bytes);
  }
}

void clear_after_failure() {
  machine.failed = false;
  machine.ready.clear();
  machine.ready_begin = 0;
  machine.unstarted.clear();
  machine.stacks.take_all_back();
  for (Thread& thread : machine.threads) {
    thread.copies.clear();
    thread.copy_groups.clear();
  }
}

void forget_readers() {
  machine.more_readers.clear();
  machine.free_readers.clear();
  machine.readers_base = machine.clock - 1;
}

// Before the counter of time overflows: forgets all history.
void restart_time() {
  machine.clock = 0;
  machine.shared_shadow = std::make_unique<Shadow>(machine.arenas_bytes);
  machine.known_rows.clear();
  ++machine.era;
}

void run_all(uint64_t blocks) {
  BlockOrder order(blocks / machine.cohort_blocks);
  for (uint64_t i = 0; i < blocks / machine.cohort_blocks && !machine.failed; ++i) {
    const uint64_t cohort = order.next();
    machine.cohort_base = machine.clock++;
    if (!machine.options.global_races) forget_readers();
    for (Meeting& meeting : machine.clusters) {
      meeting.arrived = 0;
      meeting.expected = machine.spec.cluster * machine.threads_of_block;  // threads that exit count out
      meeting.base = machine.cohort_base;
    }
    machine.grid.base = machine.cohort_base;
    for (unsigned slot = 0; slot < machine.cohort_blocks; ++slot)
      start_block(slot, cohort * machine.cohort_blocks + slot);
    run_cohort();
  }
}

}  // namespace

uint64_t random_below(uint64_t limit) {
  return uint64_t((static_cast<unsigned __int128>(next_random()) * limit) >> 64);
}

void wake(Thread& thread) {
  thread.waits_for = nullptr;
  machine.ready.push_back(&thread);
}

void wait_here(Thread& self, const char* what, Site site, unsigned mask) {
  self.waits_for = what;
  self.site = site;
  self.waits_mask = mask;
  go_on(self);
}

void progress() noexcept {
  machine.spins = 0;
}

void spin() {
  Thread* const self = current;
  if (self == nullptr) return;
  if (++machine.spins > kMaxSpins) {
    fail("livelock: every thread that can run repeats an atomic or a volatile access, and nothing changes. " +
         (machine.alive > machine.ready.size() ? "Others wait: " + describe_waiting()
                                               : std::string("Blocks of a launch that is not cooperative run one "
                                                             "after another: they cannot wait for each other")));
  }
  if (order_of(machine.options.seed) == Order::kLatestFirst && machine.ready_begin > 0) {
    machine.ready[--machine.ready_begin] = self;
  } else if (order_of(machine.options.seed) == Order::kLatestFirst) {
    machine.ready.insert(machine.ready.begin(), self);
  } else {
    machine.ready.push_back(self);
  }
  go_on(*self);
}

void fail(const std::string& message) {
  Thread* const self = current;
  if (self == nullptr) throw std::runtime_error("simt: " + message);
  machine.failed = true;
  machine.message = "simt: " + kernel_name() + ": " + name_of(*self) + ": " + message + " [seed " +
                    std::to_string(machine.options.seed) + "]";
  leave_kernel(false);
  __builtin_unreachable();
}

void set_options(const Options& options) {
  const std::lock_guard<std::mutex> lock(machine.running);
  machine.options = options;
}

Options options() {
  const std::lock_guard<std::mutex> lock(machine.running);
  return machine.options;
}

void run(const LaunchSpec& spec, const void* kernel, void (*body)(void*), void* parameters, size_t parameter_bytes) {
  if (current != nullptr) fail("a kernel launches a kernel");
  const std::lock_guard<std::mutex> lock(machine.running);
  const uint64_t blocks = uint64_t(spec.grid.x) * spec.grid.y * spec.grid.z;
  machine.spec = spec;
  machine.kernel = kernel;
  machine.body = body;
  machine.parameters = parameters;
  machine.parameter_bytes = parameter_bytes;
  machine.random = (machine.options.seed + 1) * 0x9e3779b97f4a7c15;
  machine.ranges = &global_ranges();
  reserve_cohort(spec, blocks);
  if (blocks * machine.threads_of_block >= kMaxDetectedThreads)
    throw std::runtime_error("simt: expected fewer than 2^30 threads in a launch, but got a grid of " +
                             std::to_string(blocks) + " blocks");
  if (machine.clock >= kLatestStart) restart_time();
  ++machine.launches;
  for (SharedVariable* variable : machine.shared_variables) variable->launch = 0;
  machine.shared_variables.clear();
  machine.static_bytes = machine.static_end = 0;
  machine.launch_base = machine.clock++;
  forget_readers();
  if (machine.options.global_races) machine.fences.assign(blocks, machine.launch_base);
  {
    const OverflowHandler handler;
    run_all(blocks);
  }
  if (!machine.failed) return;
  clear_after_failure();
  if (machine.exception) {
    const std::exception_ptr exception = std::exchange(machine.exception, nullptr);
    std::rethrow_exception(exception);
  }
  throw std::runtime_error(machine.message);
}

}  // namespace simt
