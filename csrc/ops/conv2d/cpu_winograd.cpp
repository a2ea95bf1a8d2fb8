// 3 x 3 convolution on the CPU by Winograd's F(2x2, 3x3) and F(4x4, 3x3): stride 1, dilation 1, groups 1, NHWC.
//
// Three steps: the tiles of the input are transformed (V), for each element of a tile a matrix of tiles x channels is
// multiplied by one of channels x outputs (M), and M is transformed to the output, with bias, batch norm, residual,
// activation and pooling. Where V of enough tiles stays in a core's cache, a thread takes a block of tiles through all
// steps; else all threads transform one larger block, then share its products by panels of outputs and rows of tiles.
// An element's result is the same for every division of the work. Non-finite values may spread within their tile.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/epilogue.h"
#include "core/parallel.h"
#include "core/transpose.h"
#include "ops/conv2d/cpu_kernels.h"
#include "ops/conv2d/cpu_pool.h"
#include "ops/conv2d/cpu_winograd_product.h"
#include "ops/conv2d/cpu_winograd_transforms.h"

namespace pvk::conv2d {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int kStripTiles = 7;              // tiles of a row whose shared columns are transformed once
constexpr int64_t kBlockBytes = 512 << 10;  // of V, where a thread keeps it to itself
constexpr int64_t kSharedBytes = 8 << 20;   // of V, where threads share it
constexpr int64_t kLeastTiles = 24;         // below, fetching the weights takes longer than multiplying
constexpr int64_t kMostTiles = 56;          // above, M leaves the core's cache
constexpr int64_t kPackChannels = 16;

// Panels of kPanel outputs: [ceil(K / kPanel)][elements of a tile][C][kPanel].
template <typename T, int kOut>
struct PackedWeights {
  static constexpr int kIn = kOut + 2, kElements = kIn * kIn;

  static int64_t count(const Conv2dParams& p) { return ceil_div<int64_t>(p.K, kPanel) * kElements * p.C * kPanel; }

  template <typename scalar_t>
  static void pack(const Conv2dParams& p, T* target) {
    const int64_t chunks = ceil_div(p.C, kPackChannels);
    parallel_for(ceil_div<int64_t>(p.K, kPanel) * chunks, 1, [&](int64_t begin, int64_t end) {
      Buffer<T> taps(kTaps);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t panel = job / chunks, c = job % chunks * kPackChannels;
        pack_part<scalar_t>(p, panel * kPanel, c, min_of(kPackChannels, p.C - c), taps.data(),
                            target + (panel * kElements * p.C + c) * kPanel, p.C);
      }
    });
  }

  // [elements of a tile][channels][kPanel] of one panel, for channels from c on. taps: kTaps elements of scratch.
  template <typename scalar_t>
  static void pack_chunk(const Conv2dParams& p, int64_t panel, int64_t c, int64_t channels, T* taps, T* target) {
    for (int64_t i = 0; i < channels; i += kPackChannels)
      pack_part<scalar_t>(p, panel * kPanel, c + i, min_of(kPackChannels, channels - i), taps, target + i * kPanel,
                          channels);
  }
  static constexpr int64_t kTaps = 9 * kPackChannels * kPanel;

 private:
  // To every `pitch` * kPanel elements of target.
  // taps: [channel][tap][kPanel], or [tap][channel][kPanel] where that is the weight's order in memory.
  template <typename scalar_t>
  static void pack_part(const Conv2dParams& p, int64_t first, int64_t c, int64_t channels, T* taps, T* target,
                        int64_t pitch) {
    const int64_t* const stride = p.weight_stride;
    const scalar_t* const source = static_cast<const scalar_t*>(p.weight) + first * stride[0] + c * stride[1];
    const int64_t outputs = min_of<int64_t>(kPanel, p.K - first);
    const bool contiguous = stride[1] == 9 && stride[2] == 3 && stride[3] == 1;
    if (contiguous) {
      load_tile(taps, kPanel, source, stride[0], 1, outputs, 9 * channels);
    } else {
      for (int r = 0; r < 3; ++r)
        for (int s = 0; s < 3; ++s)
          load_tile(taps + (r * 3 + s) * channels * kPanel, kPanel, source + r * stride[2] + s * stride[3], stride[0],
                    stride[1], outputs, channels);
    }
    const int64_t tap_pitch = contiguous ? kPanel : channels * kPanel;
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t lane = 0; lane < kPanel; lane += kLanes<T>) {
        const T* const from = taps + i * (contiguous ? 9 * kPanel : kPanel) + lane;
        T* const to = target + i * kPanel + lane;
        Vec<T> rows[kIn][3];
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          Vec<T> column[3], result[kIn];
#pragma GCC unroll 3
          for (int r = 0; r < 3; ++r) {
            // What load_tile leaves as it was, beyond whole registers.
            column[r] = lane < outputs ? load(from + (r * 3 + s) * tap_pitch) : Vec<T>{};
          }
          Winograd<kOut>::template weight<T>(column, result);
#pragma GCC unroll 6
          for (int r = 0; r < kIn; ++r) rows[r][s] = result[r];
        }
#pragma GCC unroll 6
        for (int r = 0; r < kIn; ++r) {
          Vec<T> result[kIn];
          Winograd<kOut>::template weight<T>(rows[r], result);
#pragma GCC unroll 6
          for (int s = 0; s < kIn; ++s) store(to + (r * kIn + s) * pitch * kPanel, result[s]);
        }
      }
    }
  }
};

// Memory of each thread that works at a time: one allocation, so that pages are not returned between blocks.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t threads, int64_t each) : threads_(threads), each_(each), data_(threads * each), taken_(threads) {
    for (int64_t i = 0; i < threads; ++i) taken_[i] = 0;
  }

  int64_t take() {
    for (int64_t i = 0;; i = i + 1 < threads_ ? i + 1 : 0)
      if (__atomic_exchange_n(&taken_[i], char(1), __ATOMIC_ACQUIRE) == 0) return i;
  }
  void give_back(int64_t slot) { __atomic_store_n(&taken_[slot], char(0), __ATOMIC_RELEASE); }
  T* of(int64_t slot) { return &data_[slot * each_]; }

 private:
  const int64_t threads_, each_;
  Buffer<T> data_;
  Buffer<char> taken_;
};

template <typename T>
__attribute__((noinline)) void activate_all(Activation activation, Vec<T>* values, int count) {
  with_activation(activation, [&](auto tag) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i) values[i] = activate<decltype(tag)::value, T>(values[i]);
  });
}

template <typename scalar_t, int kOut>
class Convolution {
 public:
  using T = opmath_t<scalar_t>;
  using Packed = PackedWeights<T, kOut>;
  static constexpr int kIn = kOut + 2, kElements = kIn * kIn;

  explicit Convolution(const Conv2dParams& params)
      : p(params),
        tile_rows_(ceil_div<int64_t>(p.OH, kOut)),
        tile_columns_(ceil_div<int64_t>(p.OW, kOut)),
        tiles_(p.N * tile_rows_ * tile_columns_),
        pitch_(whole(p.C)),
        epilogue_(p.K, p.bias, p.bias_dtype, p.scale, p.shift, p.scale_dtype, p.activation),
        zeros_(pitch_) {
    for (int64_t c = 0; c < pitch_; ++c) zeros_[c] = scalar_t{};
  }

  void run() {
    const int64_t threads = thread_count();
    const int64_t tile_bytes = kElements * max_of<int64_t>(pitch_, 1) * int64_t(sizeof(T));
    const int64_t fitting = min_of(kBlockBytes / tile_bytes, kMostTiles);
    const bool apart = fitting >= kLeastTiles && tiles_ >= threads * kLeastTiles;
    const int64_t most = apart ? fitting : max_of(kSharedBytes / tile_bytes, kLeastTiles);
    Buffer<T> own;
    weights_ = static_cast<const T*>(p.packed);
    const bool few = tiles_ <= min_of(most, 2 * kMostTiles) && ceil_div<int64_t>(p.K, kPanel) >= threads;
    if (weights_ == nullptr && (apart || !few)) {
      own.reserve(Packed::count(p));
      Packed::template pack<scalar_t>(p, own.data());
      weights_ = own.data();
    }
    if (apart) {
      run_apart(ceil_div(tiles_, ceil_div(ceil_div(tiles_, most), threads) * threads), threads);
    } else if (weights_ != nullptr) {
      run_together(ceil_div(tiles_, ceil_div(tiles_, most)), threads);
    } else {
      run_unpacked(threads);
    }
  }

 private:
  // Each thread takes blocks of tiles through all steps.
  void run_apart(int64_t block, int64_t threads) {
    const int64_t plane = plane_of(block, pitch_), sums_plane = plane_of(block, kPanel);
    Scratch<T> scratch(threads, kElements * (plane + sums_plane));
    parallel_for(tiles_, block, [&](int64_t begin, int64_t end) {
      const int64_t slot = scratch.take();
      T* const input = scratch.of(slot);
      T* const sums = input + kElements * plane;
      transform_input(begin, end, 0, p.C, input, plane);
      for (int64_t k = 0; k < p.K; k += kPanel)
        multiply(input, plane, begin, end, k, min_of<int64_t>(kPanel, p.K - k), sums, sums_plane);
      scratch.give_back(slot);
    });
  }

  // All threads transform a block of tiles, then share its products.
  void run_together(int64_t block, int64_t threads) {
    const int64_t plane = plane_of(block, pitch_);
    Buffer<T> input(kElements * plane);
    for (int64_t first = 0; first < tiles_; first += block) {
      const int64_t count = min_of(block, tiles_ - first);
      transform_together(first, count, input.data(), plane);
      // Enough jobs for all threads: fewer rows of tiles, then parts of a panel.
      int64_t parts = ceil_div(count, kMostTiles), width = kPanel;
      const int64_t panels = ceil_div<int64_t>(p.K, kPanel);
      while (panels * parts < 2 * threads && ceil_div(count, parts + 1) >= kLeastTiles) ++parts;
      while (ceil_div(p.K, width) * parts < threads && width > kLanes<T>) width /= 2;
      const int64_t rows = ceil_div(count, parts);
      const int64_t sums_plane = plane_of(rows, width);
      Scratch<T> scratch(threads, kElements * sums_plane);
      parallel_for(ceil_div(p.K, width) * parts, 1, [&](int64_t begin, int64_t end) {
        const int64_t slot = scratch.take();
        for (int64_t job = begin; job < end; ++job) {
          const int64_t from = job % parts * rows, k = job / parts * width;
          if (from < count)
            multiply(input.data() + from * pitch_, plane, first + from, first + min_of(from + rows, count), k,
                     min_of(width, p.K - k), scratch.of(slot), sums_plane);
        }
        scratch.give_back(slot);
      });
    }
  }

  // The same for one block, where each thread transforms the weights of its panel as it goes: they stay near.
  void run_unpacked(int64_t threads) {
    const int64_t plane = plane_of(tiles_, pitch_), sums_plane = plane_of(tiles_, kPanel);
    const int64_t most = min_of(p.C, kDepthChunk) * kPanel;
    Buffer<T> input(kElements * plane);
    transform_together(0, tiles_, input.data(), plane);
    Scratch<T> scratch(threads, kElements * (sums_plane + most) + Packed::kTaps);
    parallel_for(ceil_div<int64_t>(p.K, kPanel), 1, [&](int64_t panel, int64_t) {
      const int64_t slot = scratch.take();
      T* const sums = scratch.of(slot);
      T* const weights = sums + kElements * sums_plane;
      const int64_t outputs = min_of<int64_t>(kPanel, p.K - panel * kPanel), width = whole(outputs);
      int64_t c = 0;
      do {
        const int64_t chunk = min_of(kDepthChunk, p.C - c);
        Packed::template pack_chunk<scalar_t>(p, panel, c, chunk, weights + kElements * most, weights);
        for (int64_t e = 0; e < kElements; ++e) {
          const T* const left = input.data() + e * plane + c;
          product_chunk(left, pitch_, tiles_, weights + e * chunk * kPanel, chunk, width, sums + e * sums_plane, width,
                        c > 0, left + plane);
        }
        c += chunk;
      } while (c < p.C);
      finish(0, tiles_, panel * kPanel, outputs, sums, sums_plane);
      scratch.give_back(slot);
    });
  }

  void transform_together(int64_t first, int64_t count, T* target, int64_t plane) {
    // Jobs of about the size of a strip times four registers.
    const int64_t strip = ceil_div(count, ceil_div<int64_t>(count, kStripTiles));
    const int64_t strips = ceil_div(count, strip);
    const int64_t channels = 4 * kLanes<T>;
    parallel_for(strips * ceil_div(p.C, channels), 1, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        const int64_t from = job % strips * strip, c = job / strips * channels;
        transform_input(first + from, first + min_of(from + strip, count), c, min_of(c + channels, p.C),
                        target + from * pitch_, plane);
      }
    });
  }

  // Elements between two planes; an odd number of cache lines, so that those of a tile fall into different sets.
  static int64_t plane_of(int64_t rows, int64_t pitch) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return (ceil_div(rows * pitch, kLine) | 1) * kLine;
  }

  struct Tile {
    int64_t n, row, column;
  };
  Tile tile_at(int64_t tile) const {
    const int64_t row = tile / tile_columns_;
    return {row / tile_rows_, row % tile_rows_, tile % tile_columns_};
  }

  // target[element][tile - begin][c] for the tiles and channels given; c_begin is a multiple of kLanes.
  void transform_input(int64_t begin, int64_t end, int64_t c_begin, int64_t c_end, T* target, int64_t plane) {
    for (int64_t tile = begin; tile < end;) {
      const Tile at = tile_at(tile);
      const int64_t count = min_of(min_of<int64_t>(kStripTiles, tile_columns_ - at.column), end - tile);
      transform_strip(at, int(count), c_begin, c_end, target + (tile - begin) * pitch_, plane);
      tile += count;
    }
  }

  // The row or column of the input that is `i` of the padded one, or -1: zero, as beyond what the output reads.
  int64_t source(int64_t i, int64_t outputs, int64_t padding, int64_t size) const {
    return i < outputs + 2 ? source_index(p.padding_mode, i - padding, size) : -1;
  }

  // Tiles beside each other: all columns downwards first, those that tiles share once; then each tile across.
  void transform_strip(Tile at, int count, int64_t c_begin, int64_t c_end, T* target, int64_t plane) {
    constexpr int kMostColumns = kStripTiles * kOut + 2;
    const scalar_t* const image = static_cast<const scalar_t*>(p.input) + at.n * p.input_stride[0];
    const scalar_t* row[kIn];
    int64_t column[kMostColumns], inside[kIn];  // inside: all ones, or 0 where the row is zeros
    for (int i = 0; i < kIn; ++i) {
      const int64_t y = source(at.row * kOut + i, p.OH, p.padding_top, p.H);
      row[i] = y < 0 ? &zeros_[0] : image + y * p.input_stride[2];
      inside[i] = y < 0 ? 0 : -1;
    }
    const int columns = count * kOut + 2;
    for (int j = 0; j < columns; ++j) {
      const int64_t x = source(at.column * kOut + j, p.OW, p.padding_left, p.W);
      column[j] = x < 0 ? -1 : x * p.input_stride[3];
    }
    for (int64_t c = c_begin; c < c_end; c += kLanes<T>) {
      Vec<T> down[kIn][kMostColumns];
      const int64_t left = c_end - c;
      for (int j = 0; j < columns; ++j) {
        if (column[j] < 0) {
#pragma GCC unroll 6
          for (int i = 0; i < kIn; ++i) down[i][j] = Vec<T>{};
          continue;
        }
        Vec<T> pixel[kIn], result[kIn];
        if (left >= kLanes<T>) {
#pragma GCC unroll 6
          for (int i = 0; i < kIn; ++i) pixel[i] = load(row[i] + (column[j] & inside[i]) + c);
        } else {
          for (int i = 0; i < kIn; ++i) pixel[i] = load_first(row[i] + (column[j] & inside[i]) + c, left);
        }
        Winograd<kOut>::input(pixel, result);
#pragma GCC unroll 6
        for (int i = 0; i < kIn; ++i) down[i][j] = result[i];
      }
      for (int t = 0; t < count; ++t) {
        T* const to = target + t * pitch_ + c;
#pragma GCC unroll 6
        for (int i = 0; i < kIn; ++i) {
          Vec<T> result[kIn];
          Winograd<kOut>::input(&down[i][t * kOut], result);
#pragma GCC unroll 6
          for (int j = 0; j < kIn; ++j) store(to + (i * kIn + j) * plane, result[j]);
        }
      }
    }
  }

  // Tiles [begin, end) times outputs [first, first + outputs) of one panel, to the output.
  void multiply(const T* input, int64_t plane, int64_t begin, int64_t end, int64_t first, int64_t outputs, T* sums,
                int64_t sums_plane) {
    const T* const panel = weights_ + first / kPanel * kElements * p.C * kPanel + first % kPanel;
    const int64_t width = whole(outputs);
    for (int64_t e = 0; e < kElements; ++e)
      product(input + e * plane, pitch_, end - begin, panel + e * p.C * kPanel, p.C, width, sums + e * sums_plane,
              width, input + (e + 1) * plane);
    finish(begin, end, first, outputs, sums, sums_plane);
  }

  static int64_t whole(int64_t count) { return ceil_div<int64_t>(count, kLanes<T>) * kLanes<T>; }

  // The output of tiles [begin, end) from their sums, [element][tile][whole(outputs)].
  void finish(int64_t begin, int64_t end, int64_t first, int64_t outputs, const T* sums, int64_t sums_plane) {
    const int64_t width = whole(outputs);
    for (int64_t tile = begin; tile < end; ++tile) {
      const Tile at = tile_at(tile);
      const int64_t rows = min_of<int64_t>(kOut, p.OH - at.row * kOut);
      const int64_t columns = min_of<int64_t>(kOut, p.OW - at.column * kOut);
      for (int64_t v = 0; v < outputs; v += kLanes<T>)
        transform_output(at, int(rows), int(columns), first + v, sums + (tile - begin) * width + v, sums_plane);
    }
  }

  // One tile, one register of outputs from `k` on.
  PVK_INLINE void transform_output(Tile at, int rows, int columns, int64_t k, const T* sums, int64_t plane) {
    Vec<T> across[kOut][kIn];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) {
      Vec<T> element[kIn], result[kOut];
#pragma GCC unroll 6
      for (int i = 0; i < kIn; ++i) element[i] = load(sums + (i * kIn + j) * plane);
      Winograd<kOut>::output(element, result);
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) across[i][j] = result[i];
    }
    const Vec<T> scale = load(epilogue_.scale() + k), shift = load(epilogue_.shift() + k);
    const bool simple = p.activation == Activation::kNone || p.activation == Activation::kRelu;
    const Vec<T> lowest = splat(p.activation == Activation::kRelu ? T(0) : T(-__builtin_inf()));
    Vec<T> result[kOut][kOut];
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      Winograd<kOut>::output(across[i], result[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kOut; ++j) result[i][j] = fma(result[i][j], scale, shift);
    }
    const int64_t left = p.K - k;
    if (p.residual != nullptr) add_residual(at, rows, columns, k, left, result);
    if (simple) {
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kOut; ++j) result[i][j] = result[i][j] < lowest ? lowest : result[i][j];
    } else {
      activate_all<T>(p.activation, &result[0][0], kOut * kOut);
    }
    scalar_t* const image = static_cast<scalar_t*>(p.output) + at.n * p.output_stride[0] + k;
    const int64_t row_stride = p.output_stride[2], column_stride = p.output_stride[3];
    if (p.pool) {
      constexpr int kPooled = kOut / 2;
      scalar_t* const to = image + at.row * kPooled * row_stride + at.column * kPooled * column_stride;
      for (int i = 0; i < rows / 2; ++i)
        for (int j = 0; j < columns / 2; ++j) {
          const Vec<T> upper = pool_max<T>(result[2 * i][2 * j], result[2 * i][2 * j + 1]);
          const Vec<T> lower = pool_max<T>(result[2 * i + 1][2 * j], result[2 * i + 1][2 * j + 1]);
          put(to + i * row_stride + j * column_stride, pool_max<T>(upper, lower), left);
        }
      return;
    }
    scalar_t* const to = image + at.row * kOut * row_stride + at.column * kOut * column_stride;
    if (rows == kOut && columns == kOut && left >= kLanes<T>) {
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kOut; ++j) store(to + i * row_stride + j * column_stride, result[i][j]);
    } else {
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) put(to + i * row_stride + j * column_stride, result[i][j], left);
    }
  }

  void add_residual(Tile at, int rows, int columns, int64_t k, int64_t left, Vec<T> (*result)[kOut]) {
    const int64_t* const stride = p.residual_stride;
    const scalar_t* const from = static_cast<const scalar_t*>(p.residual) + at.n * stride[0] + k * stride[1] +
                                 at.row * kOut * stride[2] + at.column * kOut * stride[3];
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        const scalar_t* const pixel = from + i * stride[2] + j * stride[3];
        if (stride[1] != 1) {
          result[i][j] += load_strided(pixel, stride[1], min_of<int64_t>(left, kLanes<T>));
        } else {
          result[i][j] += left < kLanes<T> ? load_first(pixel, left) : load(pixel);
        }
      }
  }

  PVK_INLINE static void put(scalar_t* target, Vec<T> value, int64_t left) {
    if (left < kLanes<T>) return store_first(target, value, left);
    store(target, value);
  }

  const Conv2dParams& p;
  const int64_t tile_rows_, tile_columns_, tiles_;
  const int64_t pitch_;  // channels of V, whole registers
  const Epilogue<T> epilogue_;
  Buffer<scalar_t> zeros_;
  const T* weights_ = nullptr;
};

template <typename Body>
void dispatch(const Conv2dParams& p, const Body& body) {
  dispatch_floating(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if (p.algorithm == Algorithm::kWinograd4) {
      body.template operator()<scalar_t, 4>();
    } else {
      body.template operator()<scalar_t, 2>();
    }
  });
}

}  // namespace

void forward_winograd(const Conv2dParams& p) {
  if (p.N == 0 || p.K == 0 || p.OH == 0 || p.OW == 0) return;
  dispatch(p, [&]<typename scalar_t, int kOut>() { Convolution<scalar_t, kOut>(p).run(); });
}

int64_t packed_bytes_winograd(const Conv2dParams& p) {
  int64_t bytes = 0;
  dispatch(p, [&]<typename scalar_t, int kOut>() {
    using T = opmath_t<scalar_t>;
    bytes = PackedWeights<T, kOut>::count(p) * int64_t(sizeof(T));
  });
  return bytes;
}

void pack_winograd(const PackParams& p) {
  dispatch(p, [&]<typename scalar_t, int kOut>() {
    using T = opmath_t<scalar_t>;
    PackedWeights<T, kOut>::template pack<scalar_t>(p, static_cast<T*>(p.target));
  });
}

}  // namespace PVK_ISA
}  // namespace pvk::conv2d
