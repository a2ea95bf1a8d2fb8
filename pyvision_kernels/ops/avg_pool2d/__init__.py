"""Average pooling: schema, checks, gradient, and the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _pooling
from pyvision_kernels._check import require
from pyvision_kernels._pooling import Numbers

avg_pool2d_op, avg_pool2d_backward_op = _pooling.declare_linear(
    "avg_pool2d", "window", "bool count_include_pad, int divisor"
)


def _pool(input: Tensor, window: list[int], size: list[Any], count_include_pad: bool, divisor: int = 0) -> Tensor:
    """Of [N, C, H, W] or [C, H, W]."""
    if input.dim() == 4:
        return avg_pool2d_op(input, window, *size, count_include_pad, divisor)
    return avg_pool2d_op(input.unsqueeze(0), window, *size, count_include_pad, divisor).squeeze(0)


def avg_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of each window of a map.

    Matches `torch.nn.functional.avg_pool2d`. Sums are in float32 for 16-bit types, and rounded once.

    Args:
        input (Tensor[N, C, H, W] or [C, H, W]): float16, bfloat16, float32 or float64; any strides.
        kernel_size (int or pair): Rows and columns of a window.
        stride (int or pair): From window to window. Default: ``kernel_size``.
        padding (int or pair): Zeros around the map; at most half of ``kernel_size``. Default: 0.
        ceil_mode (bool): A last window may end outside of the padded map; it begins inside, or in the padding before.
        count_include_pad (bool): A sum is divided by the window's pixels with those in the padding; else by those in
            the map alone. Default: True.
        divisor_override (int): What it is divided by instead.

    Returns:
        Tensor[N, C, OH, OW] in input's dtype and layout.

    Raises:
        RuntimeError: no window fits, a number is out of range, a dimension but the batch is empty.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor or not made of ints.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.avg_pool2d.
    """
    op = "avg_pool2d"
    _pooling.check_input(op, input)
    window = _pooling.window_of(op, kernel_size, stride, padding)
    size = _pooling.output_size(op, window, input.shape[-2:], ceil_mode)
    if divisor_override is not None and not isinstance(divisor_override, int):
        raise TypeError(f"{op}: expected divisor_override to be an int or None, but got {divisor_override!r}")
    require(divisor_override != 0, op, "divisor_override not to be 0", divisor_override)
    if _pooling.is_for_torch(input, of_maxima=False):
        options = ceil_mode, count_include_pad, divisor_override
        return F.avg_pool2d(input, window[:2], window[2:4], window[4:6], *options)
    return _pool(input, window, size, count_include_pad, divisor_override or 0)


def avg_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The average of each window of a row: `avg_pool2d` of a map with one row.

    Matches `torch.nn.functional.avg_pool1d`.

    Args:
        input (Tensor[N, C, L] or [C, L]): float16, bfloat16, float32 or float64; any strides.
        kernel_size, stride, padding (int): As of `avg_pool2d`.
        ceil_mode, count_include_pad (bool): As of `avg_pool2d`.

    Returns:
        Tensor[N, C, OL] of input's dtype.

    Raises:
        As `avg_pool2d`.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.avg_pool1d.
    """
    op = "avg_pool1d"
    _pooling.check_input(op, input, 3)
    window = _pooling.window_of(op, kernel_size, stride, padding, count=1)
    size = _pooling.output_size(op, window, (1, input.shape[-1]), ceil_mode)
    if _pooling.is_for_torch(input, of_maxima=False):
        return F.avg_pool1d(input, window[1], window[3], window[5], ceil_mode, count_include_pad)
    return _pool(input.unsqueeze(-2), window, size, count_include_pad).squeeze(-2)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """The average of each of OH x OW windows that cover a map; of the whole map for an output of size 1.

    Matches `torch.nn.functional.adaptive_avg_pool2d`: output o of an axis reads the pixels from
    ``floor(o * size / outputs)`` up to ``ceil((o + 1) * size / outputs)``.

    Args:
        input (Tensor[N, C, H, W] or [C, H, W]): float16, bfloat16, float32 or float64; any strides.
        output_size (int, None or pair): Rows and columns of the result; None: those of the input.

    Returns:
        Tensor[N, C, OH, OW] in input's dtype and layout.

    Raises:
        RuntimeError: ``input`` has no rows or no columns.
        ValueError: ``output_size`` is negative.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor or not made of ints.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.adaptive_avg_pool2d.
    """
    op = "adaptive_avg_pool2d"
    _pooling.check_input(op, input, empty_channels=True)
    size = _pooling.adaptive_size(op, output_size, input.shape[-2:])
    if _pooling.is_for_torch(input, of_maxima=False, one_pixel=list(size) == [1, 1]):
        return F.adaptive_avg_pool2d(input, (size[0], size[1]))
    return _pool(input, [], size, True)
