// torch's thread pool, without a torch header.
#pragma once

#include <cstdint>

namespace pvk {

// Runs body(context, worker) for each worker, on as many threads of torch's pool (fewer when called from inside it).
// The same thread gets the same workers at every call.
void run_workers(int64_t workers, void (*body)(void* context, int64_t worker), void* context);
int64_t thread_count();

#if defined(PVK_ISA)
namespace PVK_ISA {

// body(begin, end) over [0, count) in pieces of `chunk`. Each thread begins with a run of pieces of its own, so that a
// kernel finds in its cache what the kernel before left there for the same part of a map; when its run is done, it
// takes pieces of the others'. Which thread runs a piece varies; a kernel is deterministic when a piece's result
// depends on the piece alone.
template <typename Body>
void parallel_for(int64_t count, int64_t chunk, const Body& body) {
  if (count <= 0) return;
  if (chunk < 1) chunk = 1;
  const int64_t pieces = (count + chunk - 1) / chunk;
  const int64_t threads = thread_count();
  if (pieces == 1 || threads == 1) {
    for (int64_t begin = 0; begin < count; begin += chunk) body(begin, begin + chunk < count ? begin + chunk : count);
    return;
  }
  constexpr int64_t kMaxRuns = 64;
  struct alignas(64) Run {
    int64_t next, end;
  };
  struct Context {
    const Body* body;
    int64_t count, chunk, runs;
    Run run[kMaxRuns];
  } context;
  const int64_t workers = pieces < threads ? pieces : threads;
  context.body = &body;
  context.count = count;
  context.chunk = chunk;
  context.runs = workers < kMaxRuns ? workers : kMaxRuns;
  for (int64_t i = 0; i < context.runs; ++i) {
    context.run[i].next = pieces * i / context.runs * chunk;
    context.run[i].end = pieces * (i + 1) / context.runs * chunk;
  }
  const auto work = [](void* opaque, int64_t worker) {
    Context& c = *static_cast<Context*>(opaque);
    for (int64_t i = 0; i < c.runs; ++i) {
      Run& run = c.run[(worker + i) % c.runs];
      for (;;) {
        const int64_t begin = __atomic_fetch_add(&run.next, c.chunk, __ATOMIC_RELAXED);
        if (begin >= run.end) break;
        (*c.body)(begin, begin + c.chunk < c.count ? begin + c.chunk : c.count);
      }
    }
  };
  run_workers(workers, work, &context);
}

}  // namespace PVK_ISA
#endif

}  // namespace pvk
