"""Average pooling in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Axis = list[tuple[list[int], int]]  # of each output, the pixels that it reads, and how many they count for


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """[N, C, H, W] or [C, H, W] -> [..., OH, OW]."""
    kernel, around = _pair(kernel_size), _pair(padding)
    step = kernel if stride is None else _pair(stride)
    axes = zip(input.shape[-2:], kernel, step, around, strict=True)
    rows, columns = (windows(*axis, ceil_mode, count_include_pad) for axis in axes)
    return averages(input, rows, columns, divisor_override)


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """[N, C, L] or [C, L] -> [..., OL]."""
    kernel, around = _pair(kernel_size)[0], _pair(padding)[0]
    step = kernel if stride is None else _pair(stride)[0]
    columns = windows(input.shape[-1], kernel, step, around, ceil_mode, count_include_pad)
    return averages(input.unsqueeze(-2), [([0], 1)], columns, None).squeeze(-2)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """[N, C, H, W] or [C, H, W] -> [..., OH, OW]."""
    wanted = output_size if isinstance(output_size, list | tuple) else (output_size, output_size)
    sizes = zip(input.shape[-2:], wanted, strict=True)
    rows, columns = (adaptive_windows(size, size if count is None else count) for size, count in sizes)
    return averages(input, rows, columns, None)


def windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, count_padding: bool) -> Axis:
    rest = size + 2 * padding - kernel
    count = (-(-rest // stride) if ceil_mode else rest // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    axis = []
    for start in (o * stride - padding for o in range(count)):
        inside = [x for x in range(start, start + kernel) if 0 <= x < size]
        axis.append((inside, min(start + kernel, size + padding) - start if count_padding else len(inside)))
    return axis


def adaptive_windows(size: int, count: int) -> Axis:
    ranges = [list(range(o * size // count, -(-(o + 1) * size // count))) for o in range(count)]
    return [(pixels, len(pixels)) for pixels in ranges]


def averages(input: Tensor, rows: Axis, columns: Axis, divisor: int | None) -> Tensor:
    values = [
        input[..., ys, :][..., xs].sum((-2, -1)) / (divisor or y_count * x_count)
        for ys, y_count in rows
        for xs, x_count in columns
    ]
    size = (*input.shape[:-2], len(rows), len(columns))
    return torch.stack(values, -1).reshape(size) if values else input.new_zeros(size) + input.sum() * 0


def _pair(value: Any) -> tuple[int, int]:
    items = (value, value) if isinstance(value, int) else tuple(value)
    return (items[0], items[-1])
