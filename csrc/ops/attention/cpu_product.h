// The products of attention: rows of a matrix, or its columns, times a packed panel.
//
// A panel is [depth][width], width being 1 to kTileVectors registers, zeros where a matrix has no more columns; of
// bfloat16 [depth / 2][width][2], pairs of neighbours along depth, a zero where the last has none.
#pragma once

#include <cstdint>

#include "core/gemm_panels.h"
#include "core/simd.h"

namespace pvk::attention::PVK_ISA {

using namespace pvk::PVK_ISA;

// result[i][:] (+)= sum over k of left(i, k) * panel[k][:].
template <typename In>
struct Product {
  using T = opmath_t<In>;
  const In* left;  // [rows][left_pitch]; of columns [depth][left_pitch], in bfloat16 [depth / 2][left_pitch][2]
  int64_t left_pitch;
  int64_t rows, depth;
  const In* panel;
  int vectors;  // of the panel
  T* result;    // [rows][pitch]
  int64_t pitch;
  bool accumulate;
};

void multiply_rows(const Product<float>& product);
void multiply_rows(const Product<double>& product);
void multiply_columns(const Product<float>& product);
void multiply_columns(const Product<double>& product);
#if defined(__AVX512F__)
void multiply_rows(const Product<BFloat16>& product);  // where cpu_has_bfloat16_dot()
void multiply_columns(const Product<BFloat16>& product);
#endif

// Whether operands are bfloat16, in pairs.
template <typename In>
inline constexpr bool kPairs = sizeof(In) == 2;

// Rows of a panel in memory: whole pairs.
template <typename In>
constexpr int64_t padded_depth(int64_t depth) {
  return kPairs<In> ? (depth + 1) / 2 * 2 : depth;
}

// body(first row, IntTag<rows>) for tiles of rows, as even as they come.
template <int kMax, typename Body>
PVK_INLINE void for_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = ceil_div<int64_t>(rows, kMax);
  int64_t row = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int count = int(ceil_div<int64_t>(rows - row, tiles - tile));
    with_rows<kMax>(count, [&](auto n) __attribute__((always_inline)) { body(row, n); });
    row += count;
  }
}

}  // namespace pvk::attention::PVK_ISA
