// Memory for scratch and for maps within a graph, kept by each thread between calls: fresh from the system it costs a
// page fault every 4 KB.
#pragma once

#include <cstdint>

namespace pvk {

// At least `bytes`, aligned to 64. Throws std::bad_alloc.
void* acquire_scratch(int64_t bytes);
// On the thread that acquired it; `bytes` as they were asked for. Null is fine.
void release_scratch(void* data, int64_t bytes);

}  // namespace pvk
