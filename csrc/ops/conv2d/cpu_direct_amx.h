// The direct convolution's bfloat16 product by tile registers (core/amx.h): 32 rows x 32 outputs at a time, whose sums
// stay in four tiles over all taps and channels. Panels are those of core/gemm_bfloat16.h.
//
// A step is 32 channels of a tap. Where fewer are left, it is the last 32, and rows are zero in those that were summed
// before: weights are finite here, so these add nothing. Needs a tap of 32 steps or more.
#pragma once

#include "core/amx.h"
#include "ops/conv2d/cpu_direct_pack.h"

#if defined(__AVX512F__)

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Sixteen rows of one tap.
struct TileRows {
  const BFloat16* row[kTileSide];
  int64_t stride;  // bytes from each to the next, where that is the same for all
  bool spaced;     // it is

  // Beyond `count` the last one again.
  PVK_INLINE void set(const BFloat16* const* rows, int64_t count) {
    for (int64_t i = 0; i < kTileSide; ++i) row[i] = rows[i < count ? i : count - 1];
    stride = reinterpret_cast<int64_t>(row[1]) - reinterpret_cast<int64_t>(row[0]);
    uint64_t differs = 0;
    for (int i = 2; i < kTileSide; ++i)
      differs |= uint64_t(reinterpret_cast<int64_t>(row[i]) - reinterpret_cast<int64_t>(row[i - 1])) ^ uint64_t(stride);
    spaced = differs == 0;
  }

  // Elements [begin, end) of every row to [begin - start, end - start) of scratch, zeros around them.
  PVK_INLINE void gather(BFloat16 (&scratch)[kTileSide][kTileDepth], int64_t start, int64_t begin, int64_t end) const {
    const uint32_t inside = (end - start == 32 ? ~0u : (1u << (end - start)) - 1) & (~0u << (begin - start));
    // The masked load reads nothing outside.
    for (int i = 0; i < kTileSide; ++i)
      _mm512_store_si512(scratch[i],
                         _mm512_maskz_loadu_epi16(inside, reinterpret_cast<const uint16_t*>(row[i]) + start));
  }
};

// One square of 16 x 16 tiles: kRowTiles x kColumnTiles of them; tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 panel.
template <int kRowTiles, int kColumnTiles, typename Tiles>
void multiply_tiles(Tiles& tiles, const DirectWeights<BFloat16>& w, const GemmBlock<float, BFloat16, BFloat16>& b,
                    int64_t first_row, int64_t first_output) {
  constexpr int kRows = kRowTiles * kTileSide;
  const int64_t count = min_of<int64_t>(kRows, b.count - first_row), width = b.pitch;
  alignas(64) BFloat16 scratch[2][kTileSide][kTileDepth];
  TileRows rows[kRowTiles];
  tiles.template clear<0>();
  if constexpr (kColumnTiles == 2) tiles.template clear<1>();
  if constexpr (kRowTiles == 2) tiles.template clear<2>();
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) tiles.template clear<3>();
  for (int64_t tap = 0; tap < w.taps; ++tap) {
    const BFloat16* const* const from = b.rows + tap * b.row_pitch + first_row;
    if (b.zeros != nullptr) {
      bool all = true;
      for (int64_t i = 0; i < count; ++i) all &= from[i] == b.zeros;
      if (all) continue;
    }
    for (int i = 0; i < kRowTiles; ++i) rows[i].set(from + i * kTileSide, count - i * kTileSide);
    for (int64_t k = 0; k < w.channels; k += kTileDepth) {
      const bool whole = k + kTileDepth <= w.channels;
      const int64_t start = whole ? k : w.depth_of_tap - kTileDepth;
      const int64_t end = whole ? k + kTileDepth : w.channels;
      const auto load_rows = [&](auto tag) __attribute__((always_inline)) {
        constexpr int i = decltype(tag)::value;
        if (whole && rows[i].spaced) {
          tiles.template load<4 + i>(rows[i].row[0] + b.first + k, rows[i].stride);
        } else {
          rows[i].gather(scratch[i], b.first + start, b.first + k, b.first + end);
          tiles.template load<4 + i>(scratch[i], 2 * kTileDepth);
        }
      };
      const BFloat16* const panel = b.panel + (tap * w.depth_of_tap + start) * width + 2 * first_output;
      load_rows(IntTag<0>{});
      tiles.template load<6>(panel, 4 * width);
      tiles.template multiply<0, 4, 6>();
      if constexpr (kColumnTiles == 2) {
        tiles.template load<7>(panel + 2 * kTileSide, 4 * width);
        tiles.template multiply<1, 4, 7>();
      }
      if constexpr (kRowTiles == 2) {
        load_rows(IntTag<1>{});
        tiles.template multiply<2, 5, 6>();
        if constexpr (kColumnTiles == 2) tiles.template multiply<3, 5, 7>();
      }
    }
  }
  float* const sums = b.sums + first_row * b.pitch + first_output;
  tiles.template store<0>(sums, 4 * b.pitch);
  if constexpr (kColumnTiles == 2) tiles.template store<1>(sums + kTileSide, 4 * b.pitch);
  if constexpr (kRowTiles == 2) tiles.template store<2>(sums + kTileSide * b.pitch, 4 * b.pitch);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2)
    tiles.template store<3>(sums + kTileSide * b.pitch + kTileSide, 4 * b.pitch);
}

// block.sums[i][:] of a whole panel, block.pitch outputs wide. Rows up to the next multiple of 16 are written too.
template <typename Tiles>
void multiply_panel_by_tiles(Tiles& tiles, const DirectWeights<BFloat16>& w,
                             const GemmBlock<float, BFloat16, BFloat16>& block) {
  constexpr int64_t kPair = 2 * kTileSide;
  for (int64_t output = 0; output < block.pitch; output += kPair) {
    const bool narrow = block.pitch - output < kPair;
    for (int64_t row = 0; row < block.count; row += kPair) {
      const bool low = block.count - row <= kTileSide;
      if (low) {
        narrow ? multiply_tiles<1, 1>(tiles, w, block, row, output)
               : multiply_tiles<1, 2>(tiles, w, block, row, output);
      } else {
        narrow ? multiply_tiles<2, 1>(tiles, w, block, row, output)
               : multiply_tiles<2, 2>(tiles, w, block, row, output);
      }
    }
  }
}

}  // namespace pvk::conv2d::PVK_ISA

#endif
