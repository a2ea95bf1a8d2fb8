// Pooling for bindings: an operator's numbers as checked axes, and maps in a layout that the kernels read.
#pragma once

#include <vector>

#include "core/binding.h"
#include "core/pool_window.h"

namespace pvk {

inline constexpr size_t kPoolNumbers = 8;  // kernel, stride, padding, dilation, of rows and columns each

// Axis 0: rows, 1: columns. No numbers: an adaptive one. Whatever passes is safe: windows are cut to the map.
inline PoolAxis pool_axis(const char* op, const std::vector<int64_t>& numbers, int axis, int64_t size,
                          int64_t outputs) {
  constexpr int64_t kMost = 2147483647;
  PVK_CHECK(numbers.empty() || numbers.size() == kPoolNumbers, op,
            ": expected window to have 8 numbers or none, but got ", numbers.size());
  PVK_CHECK(size >= 0 && size <= kMost, op, ": expected input to have at most 2147483647 rows and columns, but got ",
            size);
  PVK_CHECK(outputs >= 0 && outputs <= kMost, op,
            ": expected an output of at most 2147483647 rows and columns, but got ", outputs);
  PoolAxis a{size, outputs, 0, 1, 0, 1};
  if (numbers.empty()) return a;
  for (const int64_t number : numbers)
    PVK_CHECK(number >= 0 && number <= kMost, op, ": expected the numbers of a window in [0, 2147483647], but got ",
              number);
  a.kernel = numbers[size_t(axis)];
  a.stride = numbers[size_t(2 + axis)];
  a.padding = numbers[size_t(4 + axis)];
  a.dilation = numbers[size_t(6 + axis)];
  PVK_CHECK(a.kernel > 0 && a.stride > 0 && a.dilation > 0, op,
            ": expected kernel_size, stride and dilation to be positive, but got ", a.kernel, ", ", a.stride, " and ",
            a.dilation);
  PVK_CHECK((a.kernel - 1) * a.dilation <= kMost, op,
            ": expected windows of at most 2147483648 pixels, but got kernel_size ", a.kernel, " with dilation ",
            a.dilation);
  return a;
}

inline void check_pool_pixels(const char* op, int64_t height, int64_t width) {
  constexpr int64_t kPixels = int64_t(1) << 31;
  PVK_CHECK(width == 0 || height <= (kPixels - 1) / width, op, ": expected input to have fewer than ", kPixels,
            " pixels a channel, but got ", height, " x ", width);
}

// Whether the result of pooling a map is channels_last: PyTorch's rule (its suggest_memory_format), by which slices
// are, and pixels [N, C, 1, 1].
inline bool pools_channels_last(const Tensor& map) {
  const int64_t channel = map.stride(1), row = map.size(3) * map.stride(3), image = map.size(2) * map.stride(2);
  return channel > 0 && map.size(0) > 0 && map.stride(3) >= map.size(1) * channel && map.stride(2) >= row &&
         map.stride(0) >= image && image > channel;
}

// The map itself where its pixels (its channels, of channels_last) are next to each other and it is read so, else a
// dense copy.
inline Tensor pool_readable(const Tensor& map, bool channels_last) {
  if (channels_last) {
    if (map.stride(1) == 1 && map.stride(3) == map.size(1)) return map;
    return torch::stable::contiguous(map, torch::headeronly::MemoryFormat::ChannelsLast);
  }
  return map.stride(3) == 1 || map.size(3) == 1 ? map : torch::stable::contiguous(map);
}

// Dense in the layout of a result.
inline Tensor pool_dense(const Tensor& map, bool channels_last) {
  return channels_last ? torch::stable::contiguous(map, torch::headeronly::MemoryFormat::ChannelsLast)
                       : torch::stable::contiguous(map);
}

}  // namespace pvk
