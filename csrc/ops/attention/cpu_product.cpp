// Products of float and double.
#include "ops/attention/cpu_product.h"

namespace pvk::attention::PVK_ISA {
namespace {

template <typename T, bool kColumns, int kRows, int kVectors>
PVK_INLINE void multiply_tile(const Product<T>& p, int64_t first) {
  constexpr int kWidth = kVectors * kLanes<T>;
  const T* const left = p.left + (kColumns ? first : first * p.left_pitch);
  const T* row[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) row[i] = left + i * p.left_pitch;
  const T* column = left;
  const T* panel = p.panel;
  Tile<T, kRows, kVectors> tile;
  tile.clear();
#pragma GCC unroll 4
  for (int64_t k = 0; k < p.depth; ++k, panel += kWidth, column += p.left_pitch) {
    Vec<T> weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weight[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> value = splat(kColumns ? column[i] : row[i][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = fma(value, weight[v], tile.sum[i][v]);
    }
  }
  T* const result = p.result + first * p.pitch;
  if (p.accumulate) tile.add(result, p.pitch);
  tile.store(result, p.pitch);
}

template <bool kColumns, typename T>
void multiply(const Product<T>& p) {
  with_vectors(p.vectors, [&](auto v) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(v)::value;
    for_tiles<kTileRows[kVectors]>(p.rows, [&](int64_t row, auto n) __attribute__((always_inline)) {
      multiply_tile<T, kColumns, decltype(n)::value, kVectors>(p, row);
    });
  });
}

}  // namespace

void multiply_rows(const Product<float>& product) {
  multiply<false>(product);
}
void multiply_rows(const Product<double>& product) {
  multiply<false>(product);
}
void multiply_columns(const Product<float>& product) {
  multiply<true>(product);
}
void multiply_columns(const Product<double>& product) {
  multiply<true>(product);
}

}  // namespace pvk::attention::PVK_ISA
