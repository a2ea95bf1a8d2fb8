// How the backward is cut, by sizes alone: units that threads own, and the partial sums of what several units add to.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "ops/attention/attention.h"

namespace pvk::attention::PVK_ISA {

// A unit is a chunk of the batches, a chunk of the key heads and a part of the keys. Where a bias is shared by batches
// or heads, chunks are few, and each has a copy of the bias's gradient; where units are fewer than kUnits, keys are cut
// into parts, each with a copy of query's gradient.
struct BackwardPlan {
  static constexpr int64_t kUnits = 16;
  static constexpr int64_t kKeysAtOnce = 320, kKeysOfBlock = 256, kQueriesOfBlock = 64;

  bool has_bias, shares_batches, shares_heads, shares_keys;  // of the bias's gradient
  int64_t key_blocks, query_blocks;
  int64_t batch_chunks, head_chunks, parts;

  explicit BackwardPlan(const AttentionBackwardParams& params) {
    const AttentionParams& p = params.forward;
    has_bias = params.grad_bias != nullptr;
    shares_batches = has_bias && params.bias_size[0] < p.B;
    shares_heads = has_bias && params.bias_size[1] < p.H;
    shares_keys = has_bias && params.bias_size[3] < p.S;
    key_blocks = p.S <= kKeysAtOnce ? 1 : ceil_div(p.S, kKeysOfBlock);
    query_blocks = ceil_div(p.L, kQueriesOfBlock);
    batch_chunks = p.B;
    head_chunks = p.G;
    if (shares_batches) batch_chunks = min_of(p.B, shares_heads ? kUnits : ceil_div(kUnits, p.G));
    if (shares_heads) head_chunks = min_of(p.G, ceil_div(kUnits, batch_chunks));
    parts = min_of(key_blocks, ceil_div(kUnits, batch_chunks * head_chunks));
  }

  int64_t units() const { return batch_chunks * head_chunks * parts; }

  // Of the bias's gradient.
  int64_t copies() const {
    return (shares_batches ? batch_chunks : 1) * (shares_heads ? head_chunks : 1) * (shares_keys ? parts : 1);
  }
  int64_t copy_of(int64_t batch_chunk, int64_t head_chunk, int64_t part) const {
    int64_t copy = shares_batches ? batch_chunk : 0;
    if (shares_heads) copy = copy * head_chunks + head_chunk;
    return shares_keys ? copy * parts + part : copy;
  }
};

}  // namespace pvk::attention::PVK_ISA
