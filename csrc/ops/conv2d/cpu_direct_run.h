// The direct convolution, for any geometry: a matrix product whose rows are the pixels that the taps read.
//
// Input is NHWC (stride of C is 1). A piece of work is a block of output pixels times some panels of outputs: its table
// of row pointers is made once, each panel's sums stay in registers and L1, and the epilogue, pooling included, runs
// there. The depth (taps x channels) is cut so that a panel stays in L2; cuts depend on shapes alone, so results do not
// depend on the number of threads.
#pragma once

#include "core/buffer.h"
#include "core/epilogue.h"
#include "core/gemm_bfloat16.h"
#include "core/gemm_tile.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/conv2d/conv2d.h"
#include "ops/conv2d/cpu_direct_amx.h"
#include "ops/conv2d/cpu_direct_groups.h"
#include "ops/conv2d/cpu_direct_pack.h"
#include "ops/conv2d/cpu_direct_taps.h"
#include "ops/conv2d/cpu_pool.h"

namespace pvk::conv2d::PVK_ISA {

// float16 and bfloat16: cpu_direct_half.cpp.
void forward_direct_half(const Conv2dParams& p);
int64_t packed_bytes_direct_half(const Conv2dParams& p);
void pack_direct_half(const Conv2dParams& p, void* target);

// Of a panel that stays in L2, and of a sum before it is added to the others: the error grows with its root.
inline constexpr int64_t kDepth = 256;

// Everything that the pieces of one call share. In: of the rows and panels, the computing type or bfloat16.
template <typename In, typename scalar_t>
struct Direct {
  using T = opmath_t<In>;
  const Conv2dParams& p;
  const DirectWeights<In>& weights;
  const Epilogue<T>& epilogue;
  const TapTable& taps;
  const In* input;
  const In* packed;
  const In* zeros;
  bool skip_padding;  // weights are not finite
  int64_t units;      // output pixels, or windows of four
};

// Where a piece of the channels begins; pairs stay whole.
template <typename In>
int64_t cut(const DirectWeights<In>& w, int64_t piece, int64_t pieces) {
  const int64_t channel = w.channels * piece / pieces;
  return w.kPairs && piece < pieces ? channel / 2 * 2 : channel;
}

// sums[i][:] of one panel of one group, or what `finish` makes of them; `first` is the group's first channel.
template <typename In, typename T, typename Out>
void multiply_panel(const DirectWeights<In>& w, GemmBlock<T, In, Out> block, int vectors, const In* panel,
                    int64_t first, const TileFinish<T, Out>* finish) {
  const int width = vectors * kLanes<T>;
  const int64_t pieces = max_of<int64_t>(1, ceil_div(w.channels, kDepth));  // of the channels
  const int64_t taps_at_once = pieces > 1 ? 1 : max_of<int64_t>(1, kDepth / max_of<int64_t>(1, w.channels));
  const In* const* const rows = block.rows;
  block.tap_pitch = w.depth_of_tap * width;
  block.accumulate = false;
  for (int64_t tap = 0; tap < w.taps; tap += taps_at_once)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = cut(w, piece, pieces), end = cut(w, piece + 1, pieces);
      block.rows = rows + tap * block.row_pitch;
      block.taps = min_of(taps_at_once, w.taps - tap);
      block.depth = end - begin;
      block.first = first + begin;
      block.panel = panel + tap * block.tap_pitch + begin * width;
      const bool last = tap + block.taps == w.taps && piece + 1 == pieces;
      block.finish = last ? finish : nullptr;
      gemm_block(block, vectors);
      block.accumulate = true;
    }
}

// The same, pixel by pixel, leaving out the taps that read padding.
template <typename In, typename T, typename Out>
void multiply_panel_without_padding(const DirectWeights<In>& w, GemmBlock<T, In, Out> block, int vectors,
                                    const In* panel, int64_t first, const In* zeros) {
  const int width = vectors * kLanes<T>;
  const In* const* const rows = block.rows;
  T* const sums = block.sums;
  const int64_t count = block.count;
  block.count = block.taps = 1;
  block.depth = w.channels;
  block.first = first;
  for (int64_t i = 0; i < count; ++i) {
    block.sums = sums + i * block.pitch;
    for (int64_t lane = 0; lane < width; ++lane) block.sums[lane] = T(0);
    block.accumulate = true;
    for (int64_t tap = 0; tap < w.taps; ++tap) {
      block.rows = rows + tap * block.row_pitch + i;
      if (*block.rows == zeros) continue;
      block.panel = panel + tap * w.depth_of_tap * width;
      gemm_block(block, vectors);
    }
  }
}

// A panel's finished sums of `count` windows, corner after corner, to the largest of each window.
template <typename scalar_t>
void store_pooled(scalar_t* output, int64_t pitch, const opmath_t<scalar_t>* values, int64_t values_pitch,
                  int64_t count, int64_t channels) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      Vec<T> largest = load(values + i * values_pitch + c);
      for (int64_t corner = 1; corner < 4; ++corner)
        largest = pool_max<T>(load(values + (corner * count + i) * values_pitch + c), largest);
      if (channels - c < kLanes<T>) {
        store_first(output + i * pitch + c, largest, channels - c);
      } else {
        store(output + i * pitch + c, largest);
      }
    }
}

// Finishes a panel's sums. Rows of a residual that is not dense are not evenly spaced: one by one.
template <typename In, typename scalar_t>
void finish_block(const Direct<In, scalar_t>& d, FinishRows<scalar_t> rows, int64_t first_pixel) {
  const Conv2dParams& p = d.p;
  const int64_t (&stride)[4] = p.residual_stride;
  const scalar_t* const residual = static_cast<const scalar_t*>(p.residual) + rows.first * stride[1];
  rows.residual_channel_stride = stride[1];
  rows.residual_pitch = stride[3];
  if (p.residual == nullptr) return finish_rows(d.epilogue, rows);
  if (stride[2] == p.OW * stride[3] && stride[0] == p.OH * stride[2]) {
    rows.residual = residual + first_pixel * stride[3];
    return finish_rows(d.epilogue, rows);
  }
  const int64_t count = rows.rows;
  rows.rows = 1;
  for (int64_t pixel = first_pixel; pixel < first_pixel + count; ++pixel) {
    const int64_t x = pixel % p.OW, y = pixel / p.OW % p.OH, n = pixel / p.OW / p.OH;
    rows.residual = residual + n * stride[0] + y * stride[2] + x * stride[3];
    finish_rows(d.epilogue, rows);
    rows.sums += rows.sums_pitch;
    rows.output += rows.output_pitch;
  }
}

// Finishes the sums of `count` windows in place, corner after corner.
template <typename In, typename scalar_t>
void finish_windows(const Direct<In, scalar_t>& d, FinishRows<opmath_t<In>> rows, int64_t first, int64_t count) {
  using T = opmath_t<In>;
  const Conv2dParams& p = d.p;
  if (p.residual == nullptr) return finish_rows(d.epilogue, rows);
  const int64_t (&stride)[4] = p.residual_stride;
  T residual[kPanelWidth<T>];
  rows.residual = residual;
  rows.rows = 1;
  for (int64_t corner = 0; corner < 4; ++corner)
    for (int64_t window = first; window < first + count; ++window) {
      const int64_t width = p.columns_out(), height = p.rows_out();
      const int64_t x = window % width * 2 + corner % 2, y = window / width % height * 2 + corner / 2;
      const scalar_t* const from = static_cast<const scalar_t*>(p.residual) + window / width / height * stride[0] +
                                   rows.first * stride[1] + y * stride[2] + x * stride[3];
      for (int64_t c = 0; c < rows.channels; ++c) residual[c] = to_float(from[c * stride[1]]);
      finish_rows(d.epilogue, rows);
      rows.sums += rows.sums_pitch;
      rows.output += rows.output_pitch;
    }
}

// Whether the tiles themselves can finish the panel's outputs of the pixels from `first`, and with what.
template <typename In, typename scalar_t>
bool finishes_in_registers(const Direct<In, scalar_t>& d, TileFinish<opmath_t<In>, In>& finish, scalar_t* output,
                           int64_t first, int64_t channel, int64_t channels) {
  if constexpr (sizeof(In) != sizeof(scalar_t)) return false;
  const Conv2dParams& p = d.p;
  if (p.pool || d.weights.depth() == 0) return false;
  finish.activation = CheapActivation<opmath_t<In>>(d.epilogue.activation);
  if (!finish.activation.is_cheap) return false;
  if (p.residual != nullptr) {
    const int64_t (&stride)[4] = p.residual_stride;
    if (stride[1] != 1 || stride[2] != p.OW * stride[3] || stride[0] != p.OH * stride[2]) return false;
    finish.residual = static_cast<const In*>(p.residual) + first * stride[3] + channel;
    finish.residual_pitch = stride[3];
  }
  finish.scale = d.epilogue.scale() + channel;
  finish.shift = d.epilogue.shift() + channel;
  finish.output = reinterpret_cast<In*>(output);
  finish.output_pitch = p.K;
  finish.channels = channels;
  return true;
}

// A thread's own.
template <typename In>
struct Scratch {
  Buffer<const In*> table;
  Buffer<opmath_t<In>> sums;
};

// Panels [first_panel, last_panel) of all groups, for `count` units from `first`.
template <typename In, typename scalar_t, typename Tiles>
void compute(const Direct<In, scalar_t>& d, Scratch<In>& scratch, [[maybe_unused]] Tiles& tiles, int64_t first,
             int64_t count, int64_t first_panel, int64_t last_panel) {
  using T = opmath_t<In>;
  const Conv2dParams& p = d.p;
  const DirectWeights<In>& w = d.weights;
  const int64_t pixels = p.pool ? 4 * count : count;
  Buffer<const In*>& table = scratch.table;
  Buffer<T>& sums = scratch.sums;
  table.reserve(w.taps * pixels);
  sums.reserve(ceil_div<int64_t>(pixels, 16) * 16 * kPanelWidth<T>);  // tiles write 16 rows
  d.taps.fill(table.data(), pixels, d.input, d.zeros, first, count);
  scalar_t* const output = static_cast<scalar_t*>(p.output);
  for (int64_t i = first_panel; i < last_panel; ++i) {
    const int64_t group = i / w.panels.count, panel = i % w.panels.count;
    const int vectors = w.panels.vectors_of(panel);
    const int64_t pitch = vectors * kLanes<T>;
    const In* const packed = d.packed + w.offset_of(group, panel);
    GemmBlock<T, In, In> block{};
    block.rows = table.data();
    block.row_pitch = block.count = pixels;
    block.sums = sums.data();
    block.pitch = pitch;
    block.zeros = d.zeros;
    block.prefetch_rows = w.taps == 1 && w.channels <= 128 && w.channels >= 32 && i == first_panel;
    const int64_t channel = group * w.outputs + w.panels.first_output(panel);
    const int64_t channels = w.panels.outputs_of(panel);
    scalar_t* const to = output + first * p.K + channel;
    TileFinish<T, In> finish{};
    const bool finished = !Tiles::kPresent && finishes_in_registers(d, finish, to, first, channel, channels);
    if constexpr (Tiles::kPresent) {
      block.panel = packed;
      block.first = group * w.channels;
      multiply_panel_by_tiles(tiles, w, block);
    } else if (w.shuffled) {
      block.taps = w.taps;
      block.panel = packed;
      block.first = group * w.channels;
      block.finish = finished ? &finish : nullptr;
      const In* const zeros = d.skip_padding ? d.zeros : nullptr;
      if constexpr (sizeof(In) == 4) gemm_groups(block, int(w.depth_of_tap), zeros);
      if (finished) continue;
    } else if (d.skip_padding) {
      multiply_panel_without_padding(w, block, vectors, packed, group * w.channels, d.zeros);
    } else {
      multiply_panel(w, block, vectors, packed, group * w.channels, finished ? &finish : nullptr);
      if (finished) continue;
    }
    if (!p.pool) {
      FinishRows<scalar_t> rows{sums.data(), pitch, to, p.K, nullptr, 0, 1, pixels, channel, channels};
      finish_block(d, rows, first);
    } else {
      FinishRows<T> rows{sums.data(), pitch, sums.data(), pitch, nullptr, 0, 1, pixels, channel, channels};
      finish_windows(d, rows, first, count);
      store_pooled(to, p.K, sums.data(), pitch, count, channels);
    }
  }
}

// How the work is cut into blocks of units times runs of panels: blocks first, then panels where blocks are few. A
// block is whole tiles; its rows stay in L2, and weights that do not are worth more rows.
struct Pieces {
  int64_t units, panels, step, steps, blocks, runs;
  bool by_run;  // neighbouring pieces share weights, which are more than the rows

  template <typename In, typename scalar_t>
  explicit Pieces(const Direct<In, scalar_t>& d) : units(d.units), panels(d.weights.groups * d.weights.panels.count) {
    const int64_t rows = d.units * (d.p.pool ? 4 : 1);
    const int64_t depth = max_of<int64_t>(1, d.weights.depth());
    const int64_t largest = min_of<int64_t>(192, max_of<int64_t>(72, 48 * kDepth / 2 / depth));
    const int64_t smallest = 24;
    const int64_t steps_of_piece = 1 << 14;  // a register times an element each
    const int64_t threads = thread_count();
    const int64_t work = rows * depth * d.weights.groups * d.weights.panels.vectors;
    const int64_t wanted = threads == 1 ? 1 : max_of(threads, min_of(8 * threads, work / steps_of_piece));
    blocks = ceil_div(rows, largest);
    runs = min_of(panels, ceil_div(wanted, blocks));
    if (blocks * runs < wanted) blocks = min_of(ceil_div(rows, smallest), ceil_div(wanted, runs));
    step = kTileRows[d.weights.panels.vectors_of(0)];
    steps = ceil_div(units, step);
    blocks = min_of(blocks, steps);
    by_run = panels * d.weights.panels.vectors_of(0) * kLanes<opmath_t<In>> > rows;
  }

  template <typename Body>
  void run(const Body& body, int64_t piece) const {
    const int64_t block = by_run ? piece % blocks : piece / runs, run = by_run ? piece / blocks : piece % runs;
    const int64_t first = steps * block / blocks * step, last = min_of(units, steps * (block + 1) / blocks * step);
    body(first, last - first, panels * run / runs, panels * (run + 1) / runs);
  }
};

template <typename Tiles, typename In, typename scalar_t>
void run(const Direct<In, scalar_t>& d) {
  const Pieces pieces(d);
  const int64_t count = pieces.blocks * pieces.runs;
  parallel_for(count, count / (16 * thread_count()), [&](int64_t begin, int64_t end) {
    Scratch<In> scratch;
    [[maybe_unused]] Tiles tiles;
    for (int64_t i = begin; i < end; ++i)
      pieces.run([&](int64_t first, int64_t units, int64_t first_panel,
                     int64_t last_panel) { compute(d, scratch, tiles, first, units, first_panel, last_panel); },
                 i);
  });
}

// [N, H, W, C] dense, of the computing type.
template <typename scalar_t>
void convert_input(const Conv2dParams& p, opmath_t<scalar_t>* target) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const input = static_cast<const scalar_t*>(p.input);
  parallel_for(p.N * p.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t x = 0; x < p.W; ++x) {
        const scalar_t* const from =
            input + i / p.H * p.input_stride[0] + i % p.H * p.input_stride[2] + x * p.input_stride[3];
        T* const to = target + (i * p.W + x) * p.C;
        int64_t c = 0;
        for (; c + kLanes<T> <= p.C; c += kLanes<T>) store(to + c, load(from + c));
        if (c < p.C) store_first(to + c, load_first(from + c, p.C - c), p.C - c);
      }
  });
}

// In: scalar_t itself, or the type to which input is converted first.
template <typename In, typename scalar_t>
void forward_typed(const Conv2dParams& p) {
  Conv2dParams dense = p;
  Buffer<In> converted;
  const In* input = static_cast<const In*>(p.input);
  if constexpr (sizeof(In) != sizeof(scalar_t)) {
    converted.reserve(p.N * p.H * p.W * p.C);
    convert_input<scalar_t>(p, converted.data());
    input = converted.data();
    dense.input_stride[0] = p.H * p.W * p.C;
    dense.input_stride[1] = 1;
    dense.input_stride[2] = p.W * p.C;
    dense.input_stride[3] = p.C;
  }
  Buffer<char> scratch;
  const void* packed = p.packed;
  if (packed == nullptr || !packed_here<In>(packed)) {
    scratch.reserve(packed_bytes_typed<In>(p));
    pack_typed<In, scalar_t>(p, scratch.data());
    packed = scratch.data();
  }
  const TapTable taps(dense);
  Buffer<In> zeros;
  if (taps.padded()) {
    zeros.reserve(p.C);
    for (int64_t c = 0; c < p.C; ++c) zeros[c] = In{};
  }
  const DirectWeights<In> weights(p);
  const Epilogue<opmath_t<In>> epilogue(p.K, p.bias, p.bias_dtype, p.scale, p.shift, p.scale_dtype, p.activation);
  const bool finite = *static_cast<const int64_t*>(packed) != 0;
  const int64_t units = p.N * p.rows_out() * p.columns_out();
  const Direct<In, scalar_t> direct{dense,
                                    weights,
                                    epilogue,
                                    taps,
                                    input,
                                    reinterpret_cast<const In*>(static_cast<const char*>(packed) + kPackedHeader),
                                    taps.padded() ? zeros.data() : nullptr,
                                    taps.padded() && !finite,
                                    units};
#if defined(__AVX512F__)
  if constexpr (DirectWeights<In>::kPairs) {
    const bool fits = finite && weights.channels >= kTileDepth && (p.pool ? 4 : 1) * units >= kTileSide;
    const CpuAmx amx = fits ? cpu_amx() : CpuAmx::kNone;
    if (amx == CpuAmx::kModel) return run<ModelTiles>(direct);
    if (amx == CpuAmx::kTiles) return run<AmxTiles>(direct);
  }
#endif
  run<NoTiles>(direct);
}

}  // namespace pvk::conv2d::PVK_ISA
