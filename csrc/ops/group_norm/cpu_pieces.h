// Group normalisation on the CPU: how maps are cut, and which of the loops go over threads.
#pragma once

#include "core/norm_pieces.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/group_norm/group_norm.h"

namespace pvk::group_norm {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int64_t kElementsOfRows = 16384;  // of a piece of rows
constexpr int64_t kFeaturesOfRow = 64;      // rows of fewer channels are several pixels

// body(i, inside) for `count` samples or groups: they go over threads where there are enough of them; else they come
// one after another, and what is `inside` goes over threads.
template <typename Body>
void for_each_over_threads(int64_t count, const Body& body) {
  const int64_t threads = thread_count();
  if (threads > 1 && count < 4 * threads) {
    for (int64_t i = 0; i < count; ++i) body(i, true);
    return;
  }
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, false);
  });
}

template <typename Body>
void over_threads_if(bool inside, int64_t count, const Body& body) {
  parallel_for(count, inside ? 1 : count, body);
}

// Rows of pixels, [S, C], of which several pixels make one where channels are few: `features` = pixels * C.
struct Rows {
  int64_t pixels, features, rows, parts, piece;

  template <typename Params>
  explicit Rows(const Params& p) : pixels(1) {
    while (p.C * pixels < kFeaturesOfRow && p.S % (2 * pixels) == 0) pixels *= 2;
    features = p.C * pixels;
    rows = p.S / pixels;
    parts = parts_of(rows, p.S * p.C);
    piece = min_of(max_of(kElementsOfRows / features, int64_t(4)), int64_t(128));  // longer chains of squares round
  }

  int64_t begin(int64_t part) const { return rows * part / parts; }

  // body(first row, rows) for pieces, the last one first: it is what the sums before read last.
  template <typename Body>
  void for_pieces_backwards(bool inside, const Body& body) const {
    const int64_t pieces = ceil_div(rows, piece);
    over_threads_if(inside, pieces, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = (pieces - 1 - i) * piece;
        body(row, min_of(piece, rows - row));
      }
    });
  }
};

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::group_norm
