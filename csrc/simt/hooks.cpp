// The functions that gcc's -fsanitize=thread, alignment and bounds call around every load and store of a kernel. No
// sanitizer library is linked: these are all of it. Host code in the same files comes here too, and passes.
#if defined(SIMT_HOOKS)

#include <cstring>

#include "simt/machine.h"

using simt::Access;

#define SIMT_HOOK extern "C" [[gnu::visibility("hidden")]]
#define SIMT_HERE __builtin_return_address(0)

#define SIMT_ACCESS_HOOKS(bytes)                                           \
  SIMT_HOOK void __tsan_read##bytes(void* address) {                       \
    simt::observe(address, bytes, Access::kRead, true, SIMT_HERE);         \
  }                                                                        \
  SIMT_HOOK void __tsan_write##bytes(void* address) {                      \
    simt::observe(address, bytes, Access::kWrite, true, SIMT_HERE);        \
  }                                                                        \
  SIMT_HOOK void __tsan_unaligned_read##bytes(void* address) {             \
    simt::observe(address, bytes, Access::kRead, false, SIMT_HERE);        \
  }                                                                        \
  SIMT_HOOK void __tsan_unaligned_write##bytes(void* address) {            \
    simt::observe(address, bytes, Access::kWrite, false, SIMT_HERE);       \
  }                                                                        \
  SIMT_HOOK void __tsan_volatile_read##bytes(void* address) {              \
    simt::observe(address, bytes, Access::kAtomicRead, true, SIMT_HERE);   \
    simt::spin();                                                          \
  }                                                                        \
  SIMT_HOOK void __tsan_volatile_write##bytes(void* address) {             \
    simt::observe(address, bytes, Access::kAtomicWrite, true, SIMT_HERE);  \
  }                                                                        \
  SIMT_HOOK void __tsan_unaligned_volatile_read##bytes(void* address) {    \
    simt::observe(address, bytes, Access::kAtomicRead, false, SIMT_HERE);  \
  }                                                                        \
  SIMT_HOOK void __tsan_unaligned_volatile_write##bytes(void* address) {   \
    simt::observe(address, bytes, Access::kAtomicWrite, false, SIMT_HERE); \
  }
SIMT_ACCESS_HOOKS(1)
SIMT_ACCESS_HOOKS(2)
SIMT_ACCESS_HOOKS(4)
SIMT_ACCESS_HOOKS(8)
SIMT_ACCESS_HOOKS(16)

SIMT_HOOK void __tsan_read_range(void* address, size_t bytes) {
  simt::observe(address, bytes, Access::kRead, false, SIMT_HERE);
}
SIMT_HOOK void __tsan_write_range(void* address, size_t bytes) {
  simt::observe(address, bytes, Access::kWrite, false, SIMT_HERE);
}
SIMT_HOOK void __tsan_vptr_update(void*, void*) {}
SIMT_HOOK void __tsan_vptr_read(void*) {}
SIMT_HOOK void __tsan_func_entry(void*) {}
SIMT_HOOK void __tsan_func_exit() {}
SIMT_HOOK void __tsan_init() {}

// Copies that the compiler left to the library (see include/cuda_runtime.h).
SIMT_HOOK void* simt_memcpy(void* to, const void* from, size_t bytes) {
  simt::observe(from, bytes, Access::kRead, false, SIMT_HERE);
  simt::observe(to, bytes, Access::kWrite, false, SIMT_HERE);
  return std::memcpy(to, from, bytes);
}
SIMT_HOOK void* simt_memmove(void* to, const void* from, size_t bytes) {
  simt::observe(from, bytes, Access::kRead, false, SIMT_HERE);
  simt::observe(to, bytes, Access::kWrite, false, SIMT_HERE);
  return std::memmove(to, from, bytes);
}
SIMT_HOOK void* simt_memset(void* to, int value, size_t bytes) {
  simt::observe(to, bytes, Access::kWrite, false, SIMT_HERE);
  return std::memset(to, value, bytes);
}

// Atomics of the host's own code (function-local statics, shared_ptr); a kernel's go through simt/atomics.h.
#define SIMT_HOST_FETCH(bits, type, op)                                                \
  SIMT_HOOK type __tsan_atomic##bits##_fetch_##op(volatile type* p, type value, int) { \
    return __atomic_fetch_##op(p, value, __ATOMIC_SEQ_CST);                            \
  }
#define SIMT_HOST_EXCHANGE(bits, type, strength)                                                                       \
  SIMT_HOOK int __tsan_atomic##bits##_compare_exchange_##strength(volatile type* p, type* old, type value, int, int) { \
    return __atomic_compare_exchange_n(p, old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                      \
  }
#define SIMT_HOST_ATOMICS(bits, type)                                                \
  SIMT_HOOK type __tsan_atomic##bits##_load(const volatile type* p, int) {           \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                     \
  }                                                                                  \
  SIMT_HOOK void __tsan_atomic##bits##_store(volatile type* p, type value, int) {    \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                    \
  }                                                                                  \
  SIMT_HOOK type __tsan_atomic##bits##_exchange(volatile type* p, type value, int) { \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                          \
  }                                                                                  \
  SIMT_HOST_FETCH(bits, type, add)                                                   \
  SIMT_HOST_FETCH(bits, type, sub)                                                   \
  SIMT_HOST_FETCH(bits, type, and)                                                   \
  SIMT_HOST_FETCH(bits, type, or)                                                    \
  SIMT_HOST_FETCH(bits, type, xor)                                                   \
  SIMT_HOST_EXCHANGE(bits, type, strong)                                             \
  SIMT_HOST_EXCHANGE(bits, type, weak)
SIMT_HOST_ATOMICS(8, uint8_t)
SIMT_HOST_ATOMICS(32, uint32_t)
SIMT_HOST_ATOMICS(64, uint64_t)

// ---- alignment, and indices of arrays whose size is known ----

namespace {

struct Source {
  const char* file;
  uint32_t line, column;
};
struct TypeName {
  uint16_t kind, info;
  char name[1];
};
struct Misaligned {
  Source source;
  const TypeName* type;
  unsigned char log_alignment, kind;
};
struct OutOfBounds {
  Source source;
  const TypeName *array, *index;
};

std::string at(const Source& source) {
  return simt::short_path(source.file) + ":" + std::to_string(source.line);
}

}  // namespace

SIMT_HOOK void __ubsan_handle_type_mismatch_v1(const Misaligned* data, uintptr_t address) {
  const unsigned alignment = 1u << data->log_alignment;
  if (address % alignment == 0) return;
  static const char* const kKinds[] = {"load from", "store to", "reference to", "member access in"};
  const char* const kind = data->kind < 4 ? kKinds[data->kind] : "use of";
  simt::fail("misaligned " + std::string(kind) + " a " + data->type->name + " at " + at(data->source) +
             ": the address is no multiple of " + std::to_string(alignment));
}
SIMT_HOOK void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  simt::fail("index " + std::to_string(intptr_t(index)) + " out of bounds of " + data->array->name + " at " +
             at(data->source));
}

#endif
