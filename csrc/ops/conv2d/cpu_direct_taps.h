// Where each tap of each output pixel reads: the indirection of the direct convolution.
#pragma once

#include <cstdint>

#include "core/buffer.h"
#include "core/math.h"
#include "ops/conv2d/conv2d.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Output pixels are numbered n, oh, ow. Pooled, those of a 2 x 2 window are four runs: of `count` windows from `first`,
// first all upper left pixels, then all upper right, lower left, lower right.
class TapTable {
 public:
  explicit TapTable(const Conv2dParams& p)
      : p_(p), rows_(p.OH * p.R), columns_(p.OW * p.S), image_stride_(p.input_stride[0]) {
    for (int64_t oh = 0; oh < p.OH; ++oh)
      for (int64_t r = 0; r < p.R; ++r) {
        const int64_t h = source_index(p.padding_mode, oh * p.stride[0] - p.padding_top + r * p.dilation[0], p.H);
        rows_[oh * p.R + r] = h < 0 ? -1 : h * p.input_stride[2];
        padded_ |= h < 0;
      }
    for (int64_t ow = 0; ow < p.OW; ++ow)
      for (int64_t s = 0; s < p.S; ++s) {
        const int64_t w = source_index(p.padding_mode, ow * p.stride[1] - p.padding_left + s * p.dilation[1], p.W);
        columns_[ow * p.S + s] = w < 0 ? -1 : w * p.input_stride[3];
        padded_ |= w < 0;
      }
  }

  bool padded() const { return padded_; }  // some tap reads a padded zero

  // table[tap * pitch + i]: what the tap of pixel (or of the window) first + i reads; `zeros` where it is padding.
  template <typename Input>
  void fill(const Input** table, int64_t pitch, const Input* input, const Input* zeros, int64_t first,
            int64_t count) const {
    if (!p_.pool) return fill_run(table, pitch, input, zeros, first, count, p_.OW, p_.OH, 1, 0, 0);
    for (int64_t corner = 0; corner < 4; ++corner)
      fill_run(table + corner * count, pitch, input, zeros, first, count, p_.OW / 2, p_.OH / 2, 2, corner / 2,
               corner % 2);
  }

 private:
  template <typename Input>
  void fill_run(const Input** table, int64_t pitch, const Input* input, const Input* zeros, int64_t first,
                int64_t count, int64_t width, int64_t height, int64_t step, int64_t down, int64_t right) const {
    int64_t x = first % width, y = first / width % height, n = first / width / height;
    for (int64_t i = 0; i < count;) {
      const int64_t run = min_of(count - i, width - x);
      const Input* const image = input + n * image_stride_;
      const int64_t* const rows = &rows_[(y * step + down) * p_.R];
      const int64_t* const columns = &columns_[(x * step + right) * p_.S];
      for (int64_t r = 0; r < p_.R; ++r)
        for (int64_t s = 0; s < p_.S; ++s) {
          const Input** const to = table + (r * p_.S + s) * pitch + i;
          if (rows[r] < 0) {
            for (int64_t j = 0; j < run; ++j) to[j] = zeros;
            continue;
          }
          const Input* const row = image + rows[r];
          const int64_t* const column = columns + s;
          for (int64_t j = 0; j < run; ++j) {
            const int64_t offset = column[j * step * p_.S];
            to[j] = offset < 0 ? zeros : row + offset;
          }
        }
      i += run;
      x = 0;
      if (++y == height) {
        y = 0;
        ++n;
      }
    }
  }

  const Conv2dParams& p_;
  Buffer<int64_t> rows_, columns_;  // [OH][R], [OW][S]: element offsets, -1 for padding
  const int64_t image_stride_;
  bool padded_ = false;
};

}  // namespace pvk::conv2d::PVK_ISA
