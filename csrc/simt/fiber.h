// Fibers: stacks, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

namespace simt {

constexpr size_t kStackBytes = 64 * 1024;

// Where a fiber stopped.
struct Context {
#if defined(SIMT_UCONTEXT)
  ucontext_t machine;
#else
  void* stack_pointer = nullptr;
#endif
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
#endif
  const void* stack_low = nullptr;  // nullptr: the OS thread's own stack
};

// `entry` starts on the stack whose lowest address is `stack` when first switched to. It never returns.
void make_context(Context& context, char* stack, void (*entry)());

// Leaves `from`, which goes on when somebody switches to it. `from_ends`: nobody will.
void switch_context(Context& from, Context& to, bool from_ends = false);

// The first thing that a fiber's entry does.
void arrive_in_context(Context& self);

// Stacks, mapped on first use and kept. The lowest page of the first ones cannot be touched; the others, for which
// there are not enough mappings, carry a canary.
class StackPool {
 public:
  char* take();
  void give(char* stack) { free_.push_back(stack); }
  void take_all_back();  // after a failure
  bool contains(const void* address) const;
  bool overflowed(const char* stack) const;  // whether the canary is gone

 private:
  void grow();
  std::vector<char*> chunks_, free_;
};

}  // namespace simt
