// torch's thread pool, without a torch header.
#pragma once

#include <cstdint>

namespace pvk {

// Runs body(context) `workers` times, on as many threads of torch's pool (fewer when called from inside it).
void run_workers(int64_t workers, void (*body)(void* context), void* context);
int64_t thread_count();

#if defined(PVK_ISA)
namespace PVK_ISA {

// body(begin, end) over [0, count) in pieces of `chunk`, handed out as threads become free. Which thread runs a piece
// varies; a kernel is deterministic when a piece's result depends on the piece alone.
template <typename Body>
void parallel_for(int64_t count, int64_t chunk, const Body& body) {
  if (count <= 0) return;
  struct Context {
    const Body* body;
    int64_t next, count, chunk;
  } context{&body, 0, count, chunk < 1 ? 1 : chunk};
  const int64_t pieces = (count + context.chunk - 1) / context.chunk;
  const int64_t threads = thread_count();
  const auto worker = [](void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    for (;;) {
      const int64_t begin = __atomic_fetch_add(&c.next, c.chunk, __ATOMIC_RELAXED);
      if (begin >= c.count) return;
      (*c.body)(begin, begin + c.chunk < c.count ? begin + c.chunk : c.count);
    }
  };
  if (pieces == 1 || threads == 1) {
    worker(&context);
  } else {
    run_workers(pieces < threads ? pieces : threads, worker, &context);
  }
}

}  // namespace PVK_ISA
#endif

}  // namespace pvk
