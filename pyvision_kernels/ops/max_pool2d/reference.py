"""Max pooling in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Windows = list[list[int]]  # of each output of an axis, the pixels that it reads


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """[N, C, H, W] or [C, H, W] -> [..., OH, OW], and the places of the maxima."""
    kernel, around, spread = _pair(kernel_size), _pair(padding), _pair(dilation)
    step = kernel if stride is None else _pair(stride)
    axes = zip(input.shape[-2:], kernel, step, around, spread, strict=True)
    rows, columns = (windows(*axis, ceil_mode) for axis in axes)
    values, places = largest(input, rows, columns)
    return (values, places) if return_indices else values


def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """[N, C, L] or [C, L] -> [..., OL]."""
    kernel = _one(kernel_size)
    step = kernel if stride is None else _one(stride)
    columns = windows(input.shape[-1], kernel, step, _one(padding), _one(dilation), ceil_mode)
    values, places = largest(input.unsqueeze(-2), [[0]], columns)
    return (values.squeeze(-2), places.squeeze(-2)) if return_indices else values.squeeze(-2)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """[N, C, H, W] or [C, H, W] -> [..., OH, OW]."""
    wanted = output_size if isinstance(output_size, list | tuple) else (output_size, output_size)
    sizes = zip(input.shape[-2:], wanted, strict=True)
    rows, columns = (adaptive_windows(size, size if count is None else count) for size, count in sizes)
    values, places = largest(input, rows, columns)
    return (values, places) if return_indices else values


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
) -> Tensor:
    """[..., H, W] -> zeros [..., OH, OW], with each element of input at its place, the last of several."""
    kernel, around = _pair(kernel_size), _pair(padding)
    step = kernel if stride is None else _pair(stride)
    axes = zip(input.shape[-2:], kernel, step, around, strict=True)
    default = [(size - 1) * s - 2 * p + k for size, k, s, p in axes]
    size = default if output_size is None else list(output_size)[-2:]
    values, places = input.flatten(-2).flatten(0, -2), indices.flatten(-2).flatten(0, -2)
    planes = []
    for plane, its_places in zip(values, places.tolist(), strict=True):
        last = {place: index for index, place in enumerate(its_places)}
        at = torch.tensor(list(last), dtype=torch.int64, device=input.device)
        chosen = plane[torch.tensor(list(last.values()), dtype=torch.int64, device=input.device)]
        planes.append(plane.new_zeros(size[0] * size[1]).index_put((at,), chosen))
    out = torch.stack(planes) if planes else values.new_zeros(0, size[0] * size[1]) + values.sum()
    return out.reshape(*input.shape[:-2], *size)


def windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Windows:
    """The pixels inside of the map that each output of an axis reads."""
    rest = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-rest // stride) if ceil_mode else rest // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    starts = [o * stride - padding for o in range(count)]
    return [[x for x in range(start, start + kernel * dilation, dilation) if 0 <= x < size] for start in starts]


def adaptive_windows(size: int, count: int) -> Windows:
    return [list(range(o * size // count, -(-(o + 1) * size // count))) for o in range(count)]


def largest(input: Tensor, rows: Windows, columns: Windows) -> tuple[Tensor, Tensor]:
    """Of each window the maximum, and its place y * W + x: the first of equal ones, the last NaN."""
    width = input.shape[-1]
    values, places = [], []
    for ys in rows:
        for xs in columns:
            window = [y * width + x for y in ys for x in xs]
            if not window:
                values.append(input[..., 0, 0] * 0 - torch.inf)
                places.append(torch.full_like(values[-1], -1, dtype=torch.int64))
                continue
            pixels = input.flatten(-2)[..., window]
            order = torch.arange(1, len(window) + 1, device=input.device)
            is_nan, is_largest = pixels.isnan(), pixels == pixels.amax(-1, keepdim=True)
            score = torch.where(is_nan, order + len(window), is_largest * (len(window) + 1 - order))
            chosen = score.argmax(-1, keepdim=True)
            values.append(pixels.gather(-1, chosen).squeeze(-1))
            places.append(torch.tensor(window, device=input.device)[chosen.squeeze(-1)])
    size = (*input.shape[:-2], len(rows), len(columns))
    if not values:
        return input.new_zeros(size) + input.sum() * 0, torch.zeros(size, dtype=torch.int64, device=input.device)
    return torch.stack(values, -1).reshape(size), torch.stack(places, -1).reshape(size)


def _pair(value: Any) -> tuple[int, int]:
    items = (value, value) if isinstance(value, int) else tuple(value)
    return (items[0], items[-1])


def _one(value: Any) -> int:
    return value if isinstance(value, int) else value[0]
