// The algorithms of conv2d on the CPU. Each is a file of its own, compiled for every instruction set.
//
// Where forward_*() gets no packed weight, it packs into scratch of its own.
#pragma once

#include "ops/conv2d/conv2d.h"

namespace pvk::conv2d::PVK_ISA {

// Any convolution. Input with stride 1 along C; output channels_last.
void forward_direct(const Conv2dParams& p);
int64_t packed_bytes_direct(const Conv2dParams& p);
void pack_direct(const PackParams& p);

// 3 x 3, stride 1, dilation 1, groups 1. Input with stride 1 along C; output channels_last.
void forward_winograd(const Conv2dParams& p);
int64_t packed_bytes_winograd(const Conv2dParams& p);
void pack_winograd(const PackParams& p);

// One input channel a group. Input and output of any layout.
void forward_depthwise(const Conv2dParams& p);
int64_t packed_bytes_depthwise(const Conv2dParams& p);
void pack_depthwise(const PackParams& p);

// Groups 1, few input channels. Input and output of any layout.
void forward_few_channels(const Conv2dParams& p);
int64_t packed_bytes_few_channels(const Conv2dParams& p);
void pack_few_channels(const PackParams& p);

}  // namespace pvk::conv2d::PVK_ISA
