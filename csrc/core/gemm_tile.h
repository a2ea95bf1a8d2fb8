// The register tile of every matrix product on the CPU: a few rows times a packed panel of weights.
//
// A panel is [k][width]: width is 1 to kTileVectors registers of outputs, zeros where there are no more. A tile holds
// rows x width sums in registers; each step of k loads one row of the panel and multiplies it with one element of each
// row, broadcast. Rows are given by pointers, so a convolution points them at the pixels that its taps read.
#pragma once

#include <cstdint>

#include "core/cheap_activation.h"
#include "core/math.h"
#include "core/simd.h"
#include "core/simd_partial.h"

namespace pvk::PVK_ISA {

// Widest panel in registers, and most rows for each width: the sums, a row of the panel and one broadcast element fit
// the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileVectors = 4;
inline constexpr int kTileRows[] = {0, 12, 12, 8, 6};
#elif defined(__AVX2__)
inline constexpr int kTileVectors = 2;
inline constexpr int kTileRows[] = {0, 12, 6};
#else
inline constexpr int kTileVectors = 2;
inline constexpr int kTileRows[] = {0, 6, 4};
#endif
inline constexpr int kMaxTileRows = 12;

// Steps of k from one handful of prefetches to the next: about a hundred cycles.
inline constexpr int kAheadSteps = kRegisterBytes == 64 ? 4 : 16;

template <typename T>
inline constexpr int kPanelWidth = kTileVectors * kLanes<T>;

// What may follow the sums in registers: activation(sum * scale + shift + residual), stored.
template <typename T, typename Out = T>
struct TileFinish {
  const T* scale;  // [width], as shift
  const T* shift;
  CheapActivation<T> activation{Activation::kNone};
  Out* output;  // [rows][output_pitch]
  int64_t output_pitch;
  const Out* residual;  // [rows][residual_pitch], or null
  int64_t residual_pitch;
  int64_t channels;  // of the panel: all of its registers, the last one at least in part
};

template <typename T, int kRows, int kVectors>
struct Tile {
  Vec<T> sum[kRows][kVectors];

  PVK_INLINE void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Vec<T>{};
  }

  PVK_INLINE void add(const T* source, int64_t pitch) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += PVK_ISA::load(source + i * pitch + v * kLanes<T>);
  }

  PVK_INLINE void store(T* target, int64_t pitch) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) PVK_ISA::store(target + i * pitch + v * kLanes<T>, sum[i][v]);
  }

  // What finish() will touch: the stores of a tile miss the cache together otherwise.
  template <typename Out>
  static PVK_INLINE void prefetch(const TileFinish<T, Out>& f, int64_t row) {
    constexpr int kLine = 64 / int(sizeof(Out));
    for (int i = 0; i < kRows; ++i)
      for (int c = 0; c < kVectors * kLanes<T>; c += kLine) {
        __builtin_prefetch(f.output + (row + i) * f.output_pitch + c, 1);
        if (f.residual != nullptr) __builtin_prefetch(f.residual + (row + i) * f.residual_pitch + c);
      }
  }

  template <typename Out>
  PVK_INLINE void finish(const TileFinish<T, Out>& f, int64_t row) {
    const int64_t last = f.channels - (kVectors - 1) * kLanes<T>;
    const int64_t pitch = f.output_pitch;
    Out* const output = f.output + row * pitch;
    if (f.residual != nullptr) {
      const Out* const residual = f.residual + row * f.residual_pitch;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> scale = PVK_ISA::load(f.scale + v * kLanes<T>), shift = PVK_ISA::load(f.shift + v * kLanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const Out* const from = residual + i * f.residual_pitch + v * kLanes<T>;
          sum[i][v] = fma(sum[i][v], scale, shift) +
                      (v == kVectors - 1 && last < kLanes<T> ? load_first(from, last) : PVK_ISA::load(from));
        }
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> scale = PVK_ISA::load(f.scale + v * kLanes<T>), shift = PVK_ISA::load(f.shift + v * kLanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) sum[i][v] = fma(sum[i][v], scale, shift);
      }
    }
    f.activation.apply([&](auto operation) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] = operation(sum[i][v]);
    });
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> value = sum[i][v];
        Out* const to = output + i * pitch + v * kLanes<T>;
        if (v == kVectors - 1 && last < kLanes<T>) {
          store_first(to, value, last);
        } else {
          PVK_ISA::store(to, value);
        }
      }
  }

  // sum[i] += the sum over k in [0, depth) of rows[i][first + k] * panel[k].
  template <typename Ahead>
  PVK_INLINE void multiply(const T* const* rows, const T* panel, int64_t depth, int64_t first, Ahead& ahead) {
    constexpr int kWidth = kVectors * kLanes<T>;
    const T* row[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) row[i] = rows[i] + first;
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4, panel += 4 * kWidth) {
      if (ahead.active && k % kAheadSteps == 0) ahead.fetch();
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) this->step(row, k + step, panel + step * kWidth);
    }
    for (; k < depth; ++k, panel += kWidth) step(row, k, panel);
  }

 private:
  PVK_INLINE void step(const T* const (&row)[kRows], int64_t k, const T* panel) {
    Vec<T> weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weight[v] = PVK_ISA::load(panel + v * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> value = splat(row[i][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(value, weight[v], sum[i][v]);
    }
  }
};

template <int kValue>
struct IntTag {
  static constexpr int value = kValue;
};

// body(IntTag<rows>) for 1 <= rows <= kMax.
template <int kMax, typename Body>
PVK_INLINE void with_rows(int rows, const Body& body) {
  if constexpr (kMax == 1) {
    body(IntTag<1>{});
  } else {
    if (rows == kMax) return body(IntTag<kMax>{});
    with_rows<kMax - 1>(rows, body);
  }
}

// body(IntTag<vectors>) for 1 <= vectors <= kTileVectors.
template <int kMax = kTileVectors, typename Body>
PVK_INLINE void with_vectors(int vectors, const Body& body) {
  with_rows<kMax>(vectors, body);
}

// A block of rows times a panel: what gemm_block reads and writes. Input and output may be of a narrower type than the
// sums (core/gemm_bfloat16.h).
template <typename T, typename In = T, typename Out = T>
struct GemmBlock {
  const In* const* rows;  // [taps][row_pitch] pointers, of which the first `count` are used
  int64_t row_pitch;
  int64_t count;  // rows of the result
  int64_t taps;   // segments of k, each `depth` long
  int64_t depth;
  const In* panel;  // [taps][depth][width]; tap_pitch elements from one tap to the next
  int64_t tap_pitch;
  T* sums;  // [count][pitch]
  int64_t pitch;
  bool accumulate;                             // add to what sums holds, after the products are summed
  const TileFinish<T, Out>* finish = nullptr;  // applied to what sums would hold, instead of storing that
  int64_t first = 0;                           // added to every pointer: a group's first channel, or a chunk's
  bool prefetch_rows = false;                  // of one tap: they come from afar, fetched a tile ahead
  const In* zeros = nullptr;                   // taps that point all rows of a tile here are left out: they add zero
};

template <int kRows, typename In>
PVK_INLINE bool all_are(const In* const* rows, const In* row) {
  bool all = true;
  for (int i = 0; i < kRows; ++i) all &= rows[i] == row;
  return all;
}

// The panel after the one in work, which follows it in memory: each tile fetches its share, every kAheadSteps.
struct PanelAhead {
  static constexpr int64_t kLine = 64, kWorthwhile = 16 << 10;
  const char* next;
  const char* end;
  int64_t lines;  // at once

  template <typename T>
  PVK_INLINE PanelAhead(const GemmBlock<T>& b, int width, int64_t tiles) {
    const int64_t bytes = b.taps * b.depth * width * int64_t(sizeof(T));
    next = reinterpret_cast<const char*>(b.panel) + bytes;
    end = bytes < kWorthwhile ? next : next + bytes;
    lines = ceil_div<int64_t>(kAheadSteps * width * int64_t(sizeof(T)), kLine * tiles);
  }

  PVK_INLINE void fetch() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
  }
};

// What a tile brings into the cache while it multiplies, a few lines every kAheadSteps, because many misses at once
// hold up the loads of the products: the lines that its finish touches, the rows of the next tile, and weights.
template <typename T, int kRows, int kVectors>
struct TileAhead {
  static constexpr int kLine = 64, kWidth = kVectors * kLanes<T> * int(sizeof(T));
  static constexpr bool kAtOnce = kRegisterBytes < 64;
  PanelAhead& panel;
  bool active;
  const char* output = nullptr;
  const char* residual = nullptr;
  bool has_residual = false;
  int64_t output_pitch = 0, residual_pitch = 0;
  int outputs_left = 0;
  const T* const* row = nullptr;
  int64_t rows_left = 0, first, depth;

  // all: at once, where steps are too few. The tiles of narrow registers are small enough for that anyway.
  PVK_INLINE TileAhead(const GemmBlock<T>& b, int64_t begin, PanelAhead& panel, bool all)
      : panel(panel), active((!kAtOnce && !all) || panel.next < panel.end), first(b.first), depth(b.depth) {
    if (b.prefetch_rows) {
      row = b.rows + begin + kRows;
      rows_left = min_of<int64_t>(kRows, b.count - begin - kRows);
    }
    if (kAtOnce || all) {
      if (b.finish != nullptr) Tile<T, kRows, kVectors>::prefetch(*b.finish, begin);
#pragma GCC unroll 1
      while (rows_left > 0) fetch_row();
    } else if (b.finish != nullptr) {
      const TileFinish<T>& f = *b.finish;
      output = reinterpret_cast<const char*>(f.output + begin * f.output_pitch);
      output_pitch = f.output_pitch * int64_t(sizeof(T));
      has_residual = f.residual != nullptr;
      if (has_residual) residual = reinterpret_cast<const char*>(f.residual + begin * f.residual_pitch);
      residual_pitch = f.residual_pitch * int64_t(sizeof(T));
      outputs_left = kRows;
    }
  }

  PVK_INLINE void fetch() {
    if constexpr (!kAtOnce) {
      if (outputs_left > 0) fetch_output();
      if (rows_left > 0) fetch_row();
    }
    panel.fetch();
  }

 private:
  PVK_INLINE void fetch_output() {
    --outputs_left;
    for (int c = 0; c < kWidth; c += kLine) __builtin_prefetch(output + c, 1);
    output += output_pitch;
    if (!has_residual) return;
    for (int c = 0; c < kWidth; c += kLine) __builtin_prefetch(residual + c);
    residual += residual_pitch;
  }

  PVK_INLINE void fetch_row() {
    --rows_left;
    const T* const from = *row++ + first;
    for (int64_t k = 0; k < depth; k += kLine / int(sizeof(T))) __builtin_prefetch(from + k);
  }
};

// The last tile of a block is not left with a single row: rows are dealt out evenly.
template <typename T, int kVectors>
void gemm_block_of(const GemmBlock<T>& b) {
  constexpr int kMax = kTileRows[kVectors];
  if (b.count == 0) return;
  const int64_t tiles = ceil_div<int64_t>(b.count, kMax);
  const int64_t fewest = b.count / tiles, with_more = b.count % tiles;
  const bool few_steps = b.taps * (b.depth / kAheadSteps) < kMax;
  PanelAhead panel(b, kVectors * kLanes<T>, tiles);
  int64_t row = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int count = int(fewest + (tile < with_more));
    with_rows<kMax>(count, [&](auto rows) __attribute__((always_inline)) {
      Tile<T, decltype(rows)::value, kVectors> sums;
      T* const target = b.sums + row * b.pitch;
      TileAhead<T, decltype(rows)::value, kVectors> ahead(b, row, panel, few_steps);
      sums.clear();
      for (int64_t tap = 0; tap < b.taps; ++tap) {
        const T* const* const tap_rows = b.rows + tap * b.row_pitch + row;
        if (b.zeros != nullptr && all_are<decltype(rows)::value>(tap_rows, b.zeros)) continue;
        sums.multiply(tap_rows, b.panel + tap * b.tap_pitch, b.depth, b.first, ahead);
      }
      if (b.accumulate) sums.add(target, b.pitch);
      if (b.finish != nullptr) return sums.finish(*b.finish, row);
      sums.store(target, b.pitch);
    });
    row += count;
  }
}

// sums[i][:] (+)= sum over taps and k of rows[tap][i][k] * panel[tap][k][:], for a panel of `vectors` registers.
template <typename T>
void gemm_block(const GemmBlock<T>& block, int vectors) {
  with_vectors(vectors, [&](auto v) __attribute__((always_inline)) { gemm_block_of<T, decltype(v)::value>(block); });
}

}  // namespace pvk::PVK_ISA
