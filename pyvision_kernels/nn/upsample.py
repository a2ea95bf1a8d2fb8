"""`Upsample`, `UpsamplingNearest2d` and `UpsamplingBilinear2d`, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.nn.max_pool2d import pooled
from pyvision_kernels.ops.interpolate import interpolate

torch.fx.wrap("interpolate")  # a leaf


def _resized(layer: nn.Upsample, input: Tensor) -> Any:
    options = layer.size, layer.scale_factor, layer.mode, layer.align_corners, layer.recompute_scale_factor
    return pooled(lambda: nn.Upsample.forward(layer, input), input, interpolate, *options)


class Upsample(nn.Upsample):
    """`torch.nn.Upsample` by our kernels: see :func:`pyvision_kernels.ops.interpolate`."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [N, C, L] -> the same with OH, OW or OL."""
        return _resized(self, input)


class UpsamplingNearest2d(nn.UpsamplingNearest2d):
    """`torch.nn.UpsamplingNearest2d` by our kernels: see :func:`pyvision_kernels.ops.interpolate`."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, OH, OW]."""
        return _resized(self, input)


class UpsamplingBilinear2d(nn.UpsamplingBilinear2d):
    """`torch.nn.UpsamplingBilinear2d` by our kernels: see :func:`pyvision_kernels.ops.interpolate`."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, OH, OW]."""
        return _resized(self, input)
