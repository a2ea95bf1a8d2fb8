// Resizing of channels_last maps on the CPU: registers along channels.
//
// A task owns a tile of target columns in a band of target rows, so that the rows between the two passes stay in the
// cache. The order of the passes is that of planes.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd_pair.h"
#include "ops/interpolate/cpu_kernels.h"

namespace pvk::interpolate::PVK_ISA {
namespace {

constexpr int64_t kBandElements = 1 << 16;  // of the result, of a task
constexpr int64_t kAlong = 2;               // what a tap along a row costs, in taps across
constexpr int64_t kTileBytes = 1 << 17;     // of the rows between the passes

template <typename scalar_t>
class ChannelResize {
  using T = opmath_t<scalar_t>;

 public:
  explicit ChannelResize(const InterpolateParams& p)
      : p_(p),
        rows_(p.rows, p.backward),
        columns_(p.columns, p.backward),
        along_first_(goes_along_first(rows_, columns_, kAlong)),
        past_(goes_past_caches(p.N * p.C * rows_.targets * columns_.targets * int64_t(sizeof(scalar_t)))) {}

  void run() const {
    const bool is_whole = p_.C % kPair<scalar_t> == 0 || rows_.targets <= rows_.sources;
    if (is_whole && is_paired(rows_) && is_paired(columns_)) return blend_quads();
    const int64_t C = p_.C, pixel = C * int64_t(sizeof(T));
    // Of the wider of both sides of a row.
    const int64_t between = along_first_ ? rows_.span : ceil_div(columns_.sources, columns_.targets);
    const int64_t tile = min_of(max_of<int64_t>(2, kTileBytes / (between * pixel)), columns_.targets);
    const int64_t tiles = ceil_div(columns_.targets, tile);
    const int64_t band = min_of(max_of<int64_t>(1, kBandElements / (tile * C)), rows_.targets);
    const int64_t bands = ceil_div(rows_.targets, band);
    const int64_t chunk = max_of<int64_t>(1, kPiece / (band * tile * C));
    parallel_for(p_.N * bands * tiles, chunk, [&](int64_t begin, int64_t end) {
      Buffer<T> ring(along_first_ ? rows_.span * tile * C : 0), row;
      Buffer<const void*> taps(max_of<int64_t>(1, max_of(rows_.most, columns_.most)));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / tiles / bands;
        const Tile at{static_cast<const scalar_t*>(p_.from) + n * p_.from_stride[0],
                      static_cast<scalar_t*>(p_.to) + n * p_.to_stride[0],
                      task / tiles % bands * band,
                      min_of((task / tiles % bands + 1) * band, rows_.targets),
                      task % tiles * tile,
                      min_of((task % tiles + 1) * tile, columns_.targets)};
        if (along_first_) {
          along_then_across(at, ring.data(), taps.data());
        } else {
          across_then_along(at, row, taps.data());
        }
      }
      if (past_) end_of_streams();
    });
  }

 private:
  struct Tile {
    const scalar_t* from;  // of the image
    scalar_t* to;
    int64_t first_row, last_row, first, last;
  };

  // Whether every target has two taps.
  static bool is_paired(const TapTable<T>& table) {
    return table.most == 2 && table.begin[table.targets] == 2 * table.targets;
  }

  // Whether what begins at `place` and pixels of C are whole cache lines.
  bool is_whole_lines(const void* place) const {
    constexpr int64_t kLine = 64;
    return reinterpret_cast<uintptr_t>(place) % kLine == 0 && p_.C * int64_t(sizeof(scalar_t)) % kLine == 0;
  }

  // Two taps each way: a pixel is made from four, in the order of memory, with nothing kept between. Where channels are
  // no whole pairs of registers and the map grows, sums of rows that are kept leave fewer lanes empty.
  void blend_quads() const {
    const int64_t C = p_.C, OW = columns_.targets;
    const bool past = past_ && is_whole_lines(p_.to) && C % kPair<scalar_t> == 0;
    parallel_for(p_.N * rows_.targets, max_of<int64_t>(1, kPiece / (OW * C)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / rows_.targets, target = i % rows_.targets;
        const scalar_t* const from = static_cast<const scalar_t*>(p_.from) + n * p_.from_stride[0];
        scalar_t* to = static_cast<scalar_t*>(p_.to) + n * p_.to_stride[0] + target * p_.to_stride[2];
        const scalar_t* const upper = from + rows_.index[2 * target] * p_.from_stride[2];
        const scalar_t* const lower = from + rows_.index[2 * target + 1] * p_.from_stride[2];
        const T* const row_weights = &rows_.weight[2 * target];
        for (int64_t x = 0; x < OW; ++x, to += C) {
          const int64_t left = columns_.index[2 * x] * C, right = columns_.index[2 * x + 1] * C;
          blend_quad(upper + left, upper + right, lower + left, lower + right, &columns_.weight[2 * x], row_weights, to,
                     past);
        }
      }
      if (past) end_of_streams();
    });
  }

  PVK_INLINE void blend_quad(const scalar_t* a, const scalar_t* b, const scalar_t* c, const scalar_t* d,
                             const T* column_weights, const T* row_weights, scalar_t* to, bool past) const {
    const Pair<T> left(column_weights[0]), right(column_weights[1]), above(row_weights[0]), below(row_weights[1]);
    for_pairs<scalar_t>(p_.C, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const Pair<T> upper = fma(load_elements(b + i, n), right, load_elements(a + i, n) * left);
      const Pair<T> lower = fma(load_elements(d + i, n), right, load_elements(c + i, n) * left);
      const Pair<T> value = fma(lower, below, upper * above);
      past ? stream_elements(to + i, value) : store_elements(to + i, value, n);
    });
  }

  // Targets first to last, below last, of a row whose pixel `origin` is at `row`.
  template <typename from_t, typename to_t>
  PVK_INLINE void along(const from_t* row, int64_t origin, int64_t first, int64_t last, const void** pointers, to_t* to,
                        bool past) const {
    const from_t** const taps = reinterpret_cast<const from_t**>(pointers);
    const int64_t C = p_.C;
    if (columns_.begin[last] - columns_.begin[first] == 2 * (last - first) && columns_.most == 2) {
      for (int64_t i = columns_.begin[first]; i < columns_.begin[last]; i += 2, to += C) {
        const from_t* const pair[2] = {row + (columns_.index[i] - origin) * C,
                                       row + (columns_.index[i + 1] - origin) * C};
        add_some_rows<2>(pair, &columns_.weight[i], 2, C, to, past, NextRows<from_t>());
      }
      return;
    }
    for (int64_t target = first; target < last; ++target, to += C) {
      const int64_t begin = columns_.begin[target], count = columns_.count(target);
      for (int64_t k = 0; k < count; ++k) taps[k] = row + (columns_.index[begin + k] - origin) * C;
      add_rows(taps, &columns_.weight[begin], count, C, to, past);
    }
  }

  void along_then_across(const Tile& at, T* ring, const void** pointers) const {
    const T** const taps = reinterpret_cast<const T**>(pointers);
    const int64_t C = p_.C, pitch = (at.last - at.first) * C;
    int64_t held[kMostRing];
    fill(held, rows_.span, int64_t(-1));
    for (int64_t target = at.first_row; target < at.last_row; ++target) {
      const int64_t begin = rows_.begin[target], count = rows_.count(target);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t y = rows_.index[begin + k], slot = y % rows_.span;
        if (held[slot] == y) continue;
        held[slot] = y;
        along(at.from + y * p_.from_stride[2], 0, at.first, at.last, pointers, ring + slot * pitch, false);
      }
      for (int64_t k = 0; k < count; ++k) taps[k] = ring + rows_.index[begin + k] % rows_.span * pitch;
      add_rows(taps, &rows_.weight[begin], count, pitch, at.to + target * p_.to_stride[2] + at.first * C,
               past_ && is_whole_lines(at.to));
    }
  }

  void across_then_along(const Tile& at, Buffer<T>& row, const void** pointers) const {
    const scalar_t** const taps = reinterpret_cast<const scalar_t**>(pointers);
    const int64_t C = p_.C;
    int64_t origin = columns_.sources, end = 0;  // the pixels that the tile reads
    for (int64_t i = columns_.begin[at.first]; i < columns_.begin[at.last]; ++i) {
      origin = min_of(origin, columns_.index[i]);
      end = max_of(end, columns_.index[i] + 1);
    }
    const int64_t pixels = max_of<int64_t>(0, end - origin);
    row.reserve(pixels * C);
    const bool past = past_ && is_whole_lines(at.to);
    const int64_t ahead = ceil_div(kBytesAhead, pixels * C * int64_t(sizeof(scalar_t)));
    for (int64_t target = at.first_row; target < at.last_row; ++target) {
      const int64_t begin = rows_.begin[target], count = rows_.count(target);
      scalar_t* const result = at.to + target * p_.to_stride[2] + at.first * C;
      for (int64_t k = 0; k < count; ++k) taps[k] = at.from + rows_.index[begin + k] * p_.from_stride[2] + origin * C;
      const auto next = rows_of_next(rows_, target + ahead, at.from + origin * C, p_.from_stride[2]);
      if (columns_.unchanged) {
        add_rows(taps, &rows_.weight[begin], count, pixels * C, result, past, next);
        continue;
      }
      if (rows_.chooses && count == 1) {
        along(taps[0], origin, at.first, at.last, pointers, result, past);
        continue;
      }
      add_rows(taps, &rows_.weight[begin], count, pixels * C, row.data(), false, next);
      along(static_cast<const T*>(row.data()), origin, at.first, at.last, pointers, result, past);
    }
  }

  const InterpolateParams& p_;
  TapTable<T> rows_, columns_;
  bool along_first_, past_;
};

}  // namespace

void resize_channels(const InterpolateParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { ChannelResize<decltype(scalar)>(p).run(); });
}

}  // namespace pvk::interpolate::PVK_ISA
