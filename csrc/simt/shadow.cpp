#include "simt/shadow.h"

#include <sys/mman.h>

#include <new>

namespace simt {
namespace {

template <typename T>
T* map_zeros(size_t count) {
  void* const pages =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(pages);
}

}  // namespace

Shadow::Shadow(size_t bytes)
    : size_((bytes + 3) / 4 * 4 + 4),
      words_(map_zeros<Cell>(size_ / 4)),
      bytes_(map_zeros<Cell>(size_)),
      split_(map_zeros<uint32_t>(size_ / 4)) {}

Shadow::~Shadow() {
  munmap(words_, size_ / 4 * sizeof(Cell));
  munmap(bytes_, size_ * sizeof(Cell));
  munmap(split_, size_ / 4 * sizeof(uint32_t));
}

}  // namespace simt
