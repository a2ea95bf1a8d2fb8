// Batch normalisation on the CPU: how maps are cut into pieces, and elements of vectors of any dtype.
#pragma once

#include "core/moments.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/batch_norm/batch_norm.h"

namespace pvk::batch_norm {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int64_t kElementsOfPiece = 4096;  // of a plane, read twice while in the L1 cache
constexpr int64_t kElementsOfRows = 16384;  // of rows, read twice while in the L2 cache
constexpr int kRows = 4;                    // that are added to the sums of all channels together
// So many go to sums in T, which then go to those in double: shorter chains of rounding.
constexpr int64_t kRowsOfSum = 16, kElementsOfSum = 512;
template <typename T>
PVK_INLINE T element(const void* data, DType dtype, int64_t c, T otherwise) {
  if (data == nullptr) return otherwise;
  switch (dtype) {
    case DType::kFloat32:
      return T(static_cast<const float*>(data)[c]);
    case DType::kFloat64:
      return T(static_cast<const double*>(data)[c]);
    case DType::kFloat16:
      return T(to_float(static_cast<const Float16*>(data)[c]));
    case DType::kBFloat16:
      return T(to_float(static_cast<const BFloat16*>(data)[c]));
  }
  return otherwise;
}

// At most 128: longer chains of squares round too much.
PVK_INLINE int64_t rows_of_piece(int64_t C) {
  return min_of(max_of(kElementsOfRows / C, int64_t(kRows)), int64_t(128));
}

// Calls body(first pixel, pixels) for pieces of the pixels, the last piece first.
template <typename Body>
void for_pieces_backwards(int64_t pixels, int64_t C, const Body& body) {
  const int64_t piece = max_of(kElementsOfRows / C, int64_t(kRows)), pieces = ceil_div(pixels, piece);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (pieces - 1 - i) * piece;
      body(first, min_of(piece, pixels - first));
    }
  });
}

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::batch_norm
