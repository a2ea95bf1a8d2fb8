// Products of bfloat16 by the dot products of AVX512-BF16, two steps of the depth at once.
#include "core/gemm_bfloat16.h"
#include "ops/attention/cpu_panels.h"

#if defined(__AVX512F__)

namespace pvk::attention::PVK_ISA {
namespace {

template <bool kColumns, int kRows, int kVectors>
PVK_BFLOAT16_DOT void multiply_tile(const Product<BFloat16>& p, int64_t first) {
  constexpr int kWidth = 2 * kVectors * kLanes<float>;
  const BFloat16* const left = p.left + (kColumns ? 2 * first : first * p.left_pitch);
  const BFloat16* row[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) row[i] = left + i * p.left_pitch;
  const BFloat16* column = left;
  const BFloat16* panel = p.panel;
  Tile<float, kRows, kVectors> tile;
  tile.clear();
  const int64_t whole = kColumns ? p.depth + 1 : p.depth;  // columns come in whole pairs
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + 2 <= whole; k += 2, panel += kWidth, column += 2 * p.left_pitch) {
    __m512bh weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weight[v] = (__m512bh)_mm512_loadu_si512(panel + v * 2 * kLanes<float>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, kColumns ? column + 2 * i : row[i] + k, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = _mm512_dpbf16_ps(tile.sum[i][v], value, weight[v]);
    }
  }
  if (!kColumns && k < p.depth) {
    for (int v = 0; v < kVectors; ++v) {
      const __m512bh weight = (__m512bh)_mm512_loadu_si512(panel + v * 2 * kLanes<float>);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        tile.sum[i][v] = _mm512_dpbf16_ps(tile.sum[i][v], (__m512bh)_mm512_set1_epi32(row[i][k].bits), weight);
    }
  }
  float* const result = p.result + first * p.pitch;
  if (p.accumulate) tile.add(result, p.pitch);
  tile.store(result, p.pitch);
}

template <bool kColumns>
void multiply(const Product<BFloat16>& p) {
  with_vectors(p.vectors, [&](auto v) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(v)::value;
    for_tiles<kTileRows[kVectors]>(p.rows, [&](int64_t row, auto n) __attribute__((always_inline)) {
      multiply_tile<kColumns, decltype(n)::value, kVectors>(p, row);
    });
  });
}

PVK_BFLOAT16_DOT PVK_INLINE __m256i narrow_vector(const float* source) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(source));
}

}  // namespace

void multiply_rows(const Product<BFloat16>& product) {
  multiply<false>(product);
}
void multiply_columns(const Product<BFloat16>& product) {
  multiply<true>(product);
}

PVK_BFLOAT16_DOT void narrow_rows(BFloat16* target, const float* source, int64_t rows, int64_t pitch, int64_t begin,
                                  int64_t end) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = begin; c < end; c += kLanes<float>)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i * pitch + c), narrow_vector(source + i * pitch + c));
}

PVK_BFLOAT16_DOT void narrow_pairs(BFloat16* target, const float* source, int64_t rows, int64_t pitch, int64_t begin,
                                   int64_t end) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t c = begin; c < end; c += kLanes<float>) {
      const float* const from = source + i * pitch + c;
      const __m512i low = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), narrow_vector(from));
      const __m512i high = i + 1 < rows ? _mm512_maskz_cvtepu16_epi32(__mmask16(-1), narrow_vector(from + pitch))
                                        : _mm512_setzero_si512();
      _mm512_storeu_si512(target + i * pitch + 2 * c,
                          _mm512_or_si512(low, _mm512_maskz_slli_epi32(__mmask16(-1), high, 16)));
    }
}

}  // namespace pvk::attention::PVK_ISA

#endif
