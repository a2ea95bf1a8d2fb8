#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

#if defined(SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kChunkStacks = 256;
constexpr size_t kChunkBytes = kChunkStacks * kStackBytes;
constexpr size_t kGuardedChunks = 32;  // the kernel limits the number of mappings
constexpr uint64_t kCanary = 0x51e7c0de51e7c0de;

size_t page_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Stacks begin at different offsets of a page, so that their tops do not compete for the same lines of the cache.
size_t skew_of(const char* stack) {
  return reinterpret_cast<uintptr_t>(stack) / kStackBytes % 64 * 192;
}

}  // namespace

// ---- the switch: what a call preserves goes on the stack, then the stack pointers are swapped ----

#if defined(SIMT_UCONTEXT)

void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = kStackBytes - skew_of(stack);
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
  context.stack_low = stack;
}

static void switch_machine(Context& from, Context& to) {
  swapcontext(&from.machine, &to.machine);
}

#else

extern "C" void simt_switch(void** from, void* to) asm("simt_switch");

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr size_t kSavedWords = 8;  // six registers, the entry, and an end for backtraces
constexpr size_t kEntryWord = 6;
#else
asm(R"(
.text
.p2align 4
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr size_t kSavedWords = 20;
constexpr size_t kEntryWord = 11;  // x30
#endif

void make_context(Context& context, char* stack, void (*entry)()) {
  uint64_t* const words = reinterpret_cast<uint64_t*>(stack + kStackBytes - skew_of(stack)) - kSavedWords;
  std::memset(words, 0, kSavedWords * sizeof(uint64_t));
  words[kEntryWord] = reinterpret_cast<uint64_t>(entry);
  context.stack_pointer = words;
  context.stack_low = stack;
#if defined(SIMT_ASAN)
  context.fake_stack = nullptr;
#endif
}

static void switch_machine(Context& from, Context& to) {
  simt_switch(&from.stack_pointer, to.stack_pointer);
}

#endif

#if defined(SIMT_ASAN)

// The OS thread's own stack, as the first fiber that it switched to was told.
static thread_local const void* own_stack_low = nullptr;
static thread_local size_t own_stack_bytes = 0;
static thread_local bool from_own_stack = false;

void arrive_in_context(Context& self) {
  const void* low = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &low, &bytes);
  if (from_own_stack && own_stack_low == nullptr) own_stack_low = low, own_stack_bytes = bytes;
}

void switch_context(Context& from, Context& to, bool from_ends) {
  from_own_stack = from.stack_low == nullptr;
  const void* const low = to.stack_low ? to.stack_low : own_stack_low;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, low,
                                 to.stack_low ? kStackBytes : own_stack_bytes);
  switch_machine(from, to);
  arrive_in_context(from);
}

#else

void arrive_in_context(Context&) {}

void switch_context(Context& from, Context& to, bool) {
  switch_machine(from, to);
}

#endif

// ---- stacks ----

char* StackPool::take() {
  if (free_.empty()) grow();
  char* const stack = free_.back();
  free_.pop_back();
  return stack;
}

void StackPool::grow() {
  void* const chunk =
      mmap(nullptr, kChunkBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (chunk == MAP_FAILED) throw std::bad_alloc();
  chunks_.push_back(static_cast<char*>(chunk));
  for (size_t i = kChunkStacks; i-- > 0;) {
    char* const stack = static_cast<char*>(chunk) + i * kStackBytes;
    if (chunks_.size() <= kGuardedChunks) {
      mprotect(stack, page_bytes(), PROT_NONE);
    } else {
      std::memcpy(stack, &kCanary, sizeof(kCanary));
    }
    free_.push_back(stack);
  }
}

void StackPool::take_all_back() {
  free_.clear();
  for (size_t c = chunks_.size(); c-- > 0;) {
    for (size_t i = kChunkStacks; i-- > 0;) {
      char* const stack = chunks_[c] + i * kStackBytes;
      if (c >= kGuardedChunks) std::memcpy(stack, &kCanary, sizeof(kCanary));
      free_.push_back(stack);
    }
  }
}

bool StackPool::contains(const void* address) const {
  for (const char* chunk : chunks_) {
    if (uintptr_t(address) - uintptr_t(chunk) < kChunkBytes) return true;
  }
  return false;
}

bool StackPool::overflowed(const char* stack) const {
  for (size_t c = 0; c < std::min(chunks_.size(), kGuardedChunks); ++c) {
    if (uintptr_t(stack) - uintptr_t(chunks_[c]) < kChunkBytes) return false;
  }
  return std::memcmp(stack, &kCanary, sizeof(kCanary)) != 0;
}

}  // namespace simt
