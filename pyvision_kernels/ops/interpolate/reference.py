"""Resizing in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Axis = list[tuple[list[int], list[float]]]  # of each output, the pixels that it reads, and their weights


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """[N, C, H, W] -> [N, C, OH, OW], or [N, C, L] -> [N, C, OL]."""
    for dim in range(2, input.dim()):
        length, factor = input.shape[dim], _of_axis(scale_factor, dim - 2)
        count = _of_axis(size, dim - 2) if factor is None else int(length * factor)
        scale = length / count if factor is None or recompute_scale_factor or mode == "area" else 1 / factor
        if mode in ("nearest", "nearest-exact"):
            axis = _nearest(length, count, scale, mode == "nearest-exact")
        elif mode == "area":
            axis = _area(length, count)
        else:
            if align_corners:
                scale = (length - 1) / (count - 1) if count > 1 else 0.0
            if antialias and count == length:
                continue
            if antialias:
                axis = _antialiased(length, count, scale, cubic=mode == "bicubic")
            else:
                axis = _between(length, count, scale, bool(align_corners), cubic=mode == "bicubic")
        input = _resize(input, axis, dim)
    return input


def _of_axis(value: Any, axis: int) -> Any:
    return value[axis] if isinstance(value, list | tuple) else value


def _nearest(length: int, count: int, scale: float, exact: bool) -> Axis:
    """The index is a product in float32 whatever the dtype is."""
    single = torch.tensor(scale, dtype=torch.float32)
    places = (torch.arange(count).double() + 0.5) * single.double() if exact else torch.arange(count) * single
    pixels = places.float().floor().long().clamp(max=length - 1).tolist()
    if not exact and count == length:
        pixels = list(range(count))
    if not exact and count == 2 * length:
        pixels = [o // 2 for o in range(count)]
    return [([pixel], [1.0]) for pixel in pixels]


def _area(length: int, count: int) -> Axis:
    ranges = [list(range(o * length // count, -(-(o + 1) * length // count))) for o in range(count)]
    return [(pixels, [1 / len(pixels)] * len(pixels)) for pixels in ranges]


def _between(length: int, count: int, scale: float, align_corners: bool, cubic: bool) -> Axis:
    axis = []
    for o in range(count):
        place = scale * o if align_corners else scale * (o + 0.5) - 0.5
        if not cubic:
            place = float(o) if count == length else max(place, 0.0)
        first = min(math.floor(place), length - 1)
        t = min(max(place - first, 0.0), 1.0)
        if cubic:
            pixels = [min(max(first + k, 0), length - 1) for k in range(-1, 3)]
            axis.append((pixels, [_cubic(abs(t - k), -0.75) for k in range(-1, 3)]))
        else:
            pixels = [first, first if count == length else min(first + 1, length - 1)]
            axis.append((pixels, [1 - t, t]))
    return axis


def _antialiased(length: int, count: int, scale: float, cubic: bool) -> Axis:
    axis, widened = [], max(scale, 1.0)
    reach = (2.0 if cubic else 1.0) * widened
    for o in range(count):
        center = scale * (o + 0.5)
        pixels = list(range(max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), length)))
        distances = [abs((pixel - center + 0.5) / widened) for pixel in pixels]
        weights = [_cubic(x, -0.5) if cubic else max(1 - x, 0.0) for x in distances]
        axis.append((pixels, [weight / sum(weights) for weight in weights]))
    return axis


def _cubic(x: float, a: float) -> float:
    """Keys' cubic convolution."""
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def _resize(input: Tensor, axis: Axis, dim: int) -> Tensor:
    taps = max(len(pixels) for pixels, _ in axis)
    terms = []
    for k in range(taps):  # what an output has fewer of is not read: an infinity times zero is no number
        there = [k < len(pixels) for pixels, _ in axis]
        pixels = torch.tensor([pixels[k] if k < len(pixels) else 0 for pixels, _ in axis], device=input.device)
        weights = input.new_tensor([weights[k] if k < len(weights) else 0.0 for _, weights in axis])
        shape = [-1 if d == dim else 1 for d in range(input.dim())]
        value = input.index_select(dim, pixels) * weights.view(shape)
        if not all(there):
            value = torch.where(torch.tensor(there, device=input.device).view(shape), value, 0.0)
        terms.append(value)
    return torch.stack(terms).sum(0)
