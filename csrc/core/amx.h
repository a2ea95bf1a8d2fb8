// Intel AMX for bfloat16: eight tile registers of 16 rows x 64 bytes, and the dot products between them; and a model of
// them in plain C++, by which a kernel that is written for tiles is tested on a CPU that has none.
//
// Both are used alike: an object holds the tiles of a thread from its construction to its end. Sums are float32.
// Rows are [16][32] bfloat16, a panel is [16 pairs along k][16 outputs][2], as in core/gemm_bfloat16.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.h"
#include "core/types.h"

namespace pvk::PVK_ISA {

inline constexpr int kTileSide = 16;   // rows of a tile, and float32 of a row
inline constexpr int kTileDepth = 32;  // bfloat16 of a row

// What LDTILECFG reads: palette 1, every tile whole.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
static_assert(__builtin_offsetof(TileConfig, row_bytes) == 16 && __builtin_offsetof(TileConfig, rows) == 48);

// A kernel that has no tiles.
struct NoTiles {
  static constexpr bool kPresent = false;
};

#if defined(__AVX512F__)

// The CPU's. Instructions are written out: compilers' intrinsics do not say that they read memory, and take the tile's
// number as a literal alone.
class AmxTiles {
 public:
  static constexpr bool kPresent = true;

  AmxTiles() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~AmxTiles() { asm volatile("tilerelease" : : : "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile>
  PVK_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // stride: bytes from one row to the next.
  template <int kTile>
  PVK_INLINE void load(const void* source, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  PVK_INLINE void store(void* target, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(stride), "i"(kTile) : "memory");
  }
  // sums[m][n] += rows[m][2k] * panel[k][n][0] + rows[m][2k + 1] * panel[k][n][1], over k.
  template <int kSums, int kRows, int kPanel>
  PVK_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kPanel));
  }
};

// The model. It keeps subnormals, which the CPU takes for zero.
class ModelTiles {
 public:
  static constexpr bool kPresent = true;

  ModelTiles() { std::memset(tiles_, 0xff, sizeof(tiles_)); }  // NaN: a tile is cleared or loaded first
  ModelTiles(const ModelTiles&) = delete;
  ModelTiles& operator=(const ModelTiles&) = delete;

  template <int kTile>
  void clear() {
    std::memset(tile<kTile>(), 0, kBytes);
  }
  template <int kTile>
  void load(const void* source, int64_t stride) {
    for (int row = 0; row < config_.rows[kTile]; ++row)
      std::memcpy(tile<kTile>() + row * kRowBytes, static_cast<const char*>(source) + row * stride,
                  config_.row_bytes[kTile]);
  }
  template <int kTile>
  void store(void* target, int64_t stride) {
    for (int row = 0; row < config_.rows[kTile]; ++row)
      std::memcpy(static_cast<char*>(target) + row * stride, tile<kTile>() + row * kRowBytes, config_.row_bytes[kTile]);
  }
  template <int kSums, int kRows, int kPanel>
  void multiply() {
    const int outputs = config_.row_bytes[kSums] / 4, pairs = config_.row_bytes[kRows] / 4;
    for (int m = 0; m < config_.rows[kSums]; ++m) {
      float even[kTileSide] = {}, odd[kTileSide] = {};
      for (int k = 0; k < pairs; ++k)
        for (int n = 0; n < outputs; ++n) {
          even[n] = __builtin_fmaf(value<kRows>(m, 2 * k), value<kPanel>(k, 2 * n), even[n]);
          odd[n] = __builtin_fmaf(value<kRows>(m, 2 * k + 1), value<kPanel>(k, 2 * n + 1), odd[n]);
        }
      for (int n = 0; n < outputs; ++n) {
        char* const place = tile<kSums>() + m * kRowBytes + 4 * n;
        float sum;
        std::memcpy(&sum, place, 4);
        sum += even[n] + odd[n];
        std::memcpy(place, &sum, 4);
      }
    }
  }

 private:
  static constexpr int kRowBytes = 64, kBytes = 16 * kRowBytes;

  template <int kTile>
  char* tile() {
    static_assert(kTile >= 0 && kTile < 8);
    return tiles_ + kTile * kBytes;
  }
  template <int kTile>
  float value(int row, int i) {
    BFloat16 result;
    std::memcpy(&result, tile<kTile>() + row * kRowBytes + 2 * i, 2);
    return to_float(result);
  }

  const TileConfig config_;
  alignas(64) char tiles_[8 * kBytes];
};

#endif

}  // namespace pvk::PVK_ISA
