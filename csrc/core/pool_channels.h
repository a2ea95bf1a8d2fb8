// Pooling of channels_last maps on the CPU, registers along channels: the rows of a window by groups, and the rows
// after them asked for early.
//
// Windows walk a few rows side by side, which the hardware does not follow as well as memory in its order. While they
// are read, the rows that come next are fetched to the second cache in that order.
#pragma once

#include "core/parallel.h"
#include "core/pool_rows.h"
#include "core/simd_pair.h"

namespace pvk::PVK_ISA {

inline constexpr int64_t kRowsAtOnce = 4;         // of a window that shares few rows with the next
inline constexpr int64_t kLeastAhead = 1 << 20;   // bytes of a map: smaller ones are in the second cache
inline constexpr int64_t kMostAhead = 512 << 10;  // bytes that it is to hold

// Cache lines to be asked for.
struct Ahead {
  static constexpr uintptr_t kLine = 64;
  uintptr_t at = 0, end = 0;

  PVK_INLINE void ask(int lines) {
    if (at >= end) return;
#pragma GCC unroll 8
    for (int i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(at + uintptr_t(i) * kLine), 0, 2);
    at += uintptr_t(lines) * kLine;
  }
};

// Of the channels of a pixel that are read at once.
template <typename scalar_t, int kPairs>
inline constexpr int kLinesOf = max_of<int>(1, kPairs* kPair<scalar_t>* int(sizeof(scalar_t)) / int(Ahead::kLine));

template <typename scalar_t>
struct ChannelsMap {
  const scalar_t* data;
  int64_t N, C;
  const int64_t* stride;
  PoolAxis rows, columns;
  int64_t at_once;  // rows of a group
  bool asks;

  ChannelsMap(const void* map, int64_t N, int64_t C, const int64_t* stride, const PoolAxis& rows,
              const PoolAxis& columns)
      : data(static_cast<const scalar_t*>(map)), N(N), C(C), stride(stride), rows(rows), columns(columns) {
    const int64_t row = C * columns.size;
    asks = N * rows.size * row * int64_t(sizeof(scalar_t)) >= kLeastAhead && stride[2] <= row + row / 4;
    at_once = asks && rows.stride >= rows.kernel ? kRowsAtOnce : max_of(rows.kernel, rows.size);
  }

  PVK_INLINE PoolRange group(const PoolRange& window, int64_t y) const {
    return {y, min_of(y + at_once * rows.dilation, window.end)};
  }

  PVK_INLINE Ahead ahead(int64_t n, const PoolRange& next) const {
    const int64_t bytes = (next.end - next.begin) * stride[2] * int64_t(sizeof(scalar_t));
    if (!asks || bytes <= 0 || bytes > kMostAhead) return {};
    const uintptr_t at = reinterpret_cast<uintptr_t>(data + n * stride[0] + next.begin * stride[2]);
    return {at, at + uintptr_t(bytes)};
  }

  // body(rows, whether they are the first, the last of the window, what to ask for meanwhile) for the groups of rows of
  // windows oh of image n.
  template <typename Body>
  PVK_INLINE void for_groups(int64_t n, int64_t oh, const Body& body) const {
    const PoolRange window = rows.window(oh);
    PoolRange now = group(window, window.begin);
    for (;;) {
      const bool last = now.end >= window.end;
      PoolRange next{0, 0};
      int64_t image = n;
      if (!last) {
        next = group(window, now.end);
      } else if (oh + 1 < rows.outputs || n + 1 < N) {
        const bool below = oh + 1 < rows.outputs;
        const PoolRange following = rows.window(below ? oh + 1 : 0);
        next = group(following, following.begin);
        if (below) next.begin = max_of(next.begin, now.end);
        if (!below) ++image;
      }
      body(now, now.begin == window.begin, last, ahead(image, next));
      if (last) return;
      now = next;
    }
  }
};

// Backward: rows of outputs that row y + 1 of the map reads, and row y does not; where y is the last of an image, those
// of the image after it. `pooled` is that of image n.
template <typename value_t>
PVK_INLINE Ahead ahead_of_outputs(const PoolAxis& rows, const value_t* pooled, const int64_t* stride, int64_t y,
                                  bool last_image) {
  const bool below = y + 1 < rows.size;
  if (!below && last_image) return {};
  PoolRange next = rows.outputs_of(below ? y + 1 : 0);
  if (below) next.begin = max_of(next.begin, rows.outputs_of(y).end);
  const int64_t bytes = (next.end - next.begin) * stride[2] * int64_t(sizeof(value_t));
  if (bytes <= 0 || bytes > kMostAhead) return {};
  const uintptr_t at = reinterpret_cast<uintptr_t>(pooled + (below ? 0 : stride[0]) + next.begin * stride[2]);
  return {at, at + uintptr_t(bytes)};
}

// body.operator()<pairs, whether the last is whole>(channel, channels of the last).
template <typename scalar_t, typename Body>
PVK_INLINE void for_channels(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kStep = kPair<scalar_t>;
  int64_t c = begin;
  for (; c + 2 * kStep <= end; c += 2 * kStep) body.template operator()<2, true>(c, kStep);
  for (; c + kStep <= end; c += kStep) body.template operator()<1, true>(c, kStep);
  if (c < end) body.template operator()<1, false>(c, end - c);
}

// Parts of the channels, tasks of their own where rows of outputs are too few for the threads. A part is whole pairs.
template <typename scalar_t>
PVK_INLINE int64_t channels_of_part(int64_t C, int64_t tasks) {
  constexpr int64_t kLeast = 4 * kPair<scalar_t>;
  const int64_t threads = thread_count();
  if (tasks >= 4 || threads == 1) return C;
  return max_of(ceil_div(ceil_div(C, min_of<int64_t>(threads, 8)), kLeast) * kLeast, kLeast);
}

}  // namespace pvk::PVK_ISA
