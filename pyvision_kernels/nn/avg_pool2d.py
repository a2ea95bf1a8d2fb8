"""`AvgPool2d`, `AvgPool1d` and `AdaptiveAvgPool2d`, in place of torch.nn's."""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.nn.max_pool2d import pooled
from pyvision_kernels.ops.avg_pool2d import adaptive_avg_pool2d, avg_pool1d, avg_pool2d

# Leaves for torch.fx.
torch.fx.wrap("adaptive_avg_pool2d")
torch.fx.wrap("avg_pool1d")
torch.fx.wrap("avg_pool2d")


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d` by our kernels: see :func:`pyvision_kernels.ops.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W] -> the same with OH, OW."""
        window = self.kernel_size, self.stride, self.padding
        options = self.ceil_mode, self.count_include_pad, self.divisor_override
        return pooled(lambda: nn.AvgPool2d.forward(self, input), input, avg_pool2d, *window, *options)


class AvgPool1d(nn.AvgPool1d):
    """`torch.nn.AvgPool1d` by our kernels: see :func:`pyvision_kernels.ops.avg_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, L] or [C, L] -> the same with OL."""
        window = self.kernel_size, self.stride, self.padding
        options = self.ceil_mode, self.count_include_pad
        return pooled(lambda: nn.AvgPool1d.forward(self, input), input, avg_pool1d, *window, *options)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` by our kernels: see :func:`pyvision_kernels.ops.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W] -> the same with OH, OW."""
        stock = nn.AdaptiveAvgPool2d.forward
        return pooled(lambda: stock(self, input), input, adaptive_avg_pool2d, self.output_size)
