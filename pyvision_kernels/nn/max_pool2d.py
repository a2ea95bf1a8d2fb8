"""`MaxPool2d`, `MaxPool1d`, `AdaptiveMaxPool2d` and `MaxUnpool2d`, in place of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.nn._layer import is_for_torch, is_traced
from pyvision_kernels.ops.max_pool2d import adaptive_max_pool2d, max_pool1d, max_pool2d, max_unpool2d

# Leaves for torch.fx.

torch.fx.wrap("adaptive_max_pool2d")
torch.fx.wrap("max_pool1d")
torch.fx.wrap("max_pool2d")
torch.fx.wrap("max_unpool2d")


def pooled(stock: Callable[..., Any], input: Tensor, ours: Callable[..., Any], *arguments: Any) -> Any:
    """By our function, or by the stock layer's forward: that takes more, and words what both refuse."""
    if is_for_torch(input):
        return stock()
    if is_traced(input):
        return ours(input, *arguments)
    try:
        return ours(input, *arguments)
    except (RuntimeError, ValueError, TypeError):
        return stock()


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` by our kernels: see :func:`pyvision_kernels.ops.max_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        """[N, C, H, W] or [C, H, W] -> the same with OH, OW; with the indices, where asked for."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        options = self.ceil_mode, self.return_indices
        return pooled(lambda: nn.MaxPool2d.forward(self, input), input, max_pool2d, *window, *options)


class MaxPool1d(nn.MaxPool1d):
    """`torch.nn.MaxPool1d` by our kernels: see :func:`pyvision_kernels.ops.max_pool1d`."""

    def forward(self, input: Tensor) -> Any:
        """[N, C, L] or [C, L] -> the same with OL; with the indices, where asked for."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        options = self.ceil_mode, self.return_indices
        return pooled(lambda: nn.MaxPool1d.forward(self, input), input, max_pool1d, *window, *options)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` by our kernels: see :func:`pyvision_kernels.ops.adaptive_max_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        """[N, C, H, W] or [C, H, W] -> the same with OH, OW; with the indices, where asked for."""
        options = self.output_size, self.return_indices
        return pooled(lambda: nn.AdaptiveMaxPool2d.forward(self, input), input, adaptive_max_pool2d, *options)


class MaxUnpool2d(nn.MaxUnpool2d):
    """`torch.nn.MaxUnpool2d` by our kernels: see :func:`pyvision_kernels.ops.max_unpool2d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        """[N, C, H, W] or [C, H, W] and indices -> the same with OH, OW."""
        window = self.kernel_size, self.stride, self.padding
        stock = nn.MaxUnpool2d.forward
        return pooled(
            lambda: stock(self, input, indices, output_size), input, max_unpool2d, indices, *window, output_size
        )
