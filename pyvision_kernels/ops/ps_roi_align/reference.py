"""Position-sensitive RoI align and pool in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyvision_kernels.ops.roi_align.reference import _axis as _align_axis


def ps_roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """[N, C * PH * PW, H, W], [K, 5] -> [K, C, PH, PW]. The samples are those of `roi_align` with `aligned`."""

    def axis(low: float, high: float, bins: int, size: int) -> Tensor | None:
        return _align_axis(low, high, bins, size, spatial_scale, sampling_ratio, True, input)

    return _pool(input, boxes, output_size, axis)


def ps_roi_pool(input: Tensor, boxes: Tensor, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> Tensor:
    """[N, C * PH * PW, H, W], [K, 5] -> [K, C, PH, PW]. The mean over whole pixels but the last row and column."""

    def axis(low: float, high: float, bins: int, size: int) -> Tensor | None:
        start, end = _round(low * spatial_scale), _round(high * spatial_scale)
        length = max(end - start, 1) / bins
        matrix = input.new_zeros(bins, size)
        for p in range(bins):
            first = min(max(start + math.floor(p * length), 0), max(size - 1, 0))
            last = min(max(start + math.ceil((p + 1) * length), 0), max(size - 1, 0))
            matrix[p, first:last] = 1 / max(last - first, 1)
        return matrix

    return _pool(input, boxes, output_size, axis)


def _round(value: float) -> int:
    """Halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _pool(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    axis: Callable[[float, float, int, int], Tensor | None],
) -> Tensor:
    """`axis` gives [bins, size], the weight of each pixel in each bin; None: there is no sample."""
    pooled = (output_size, output_size) if isinstance(output_size, int) else output_size
    planes = input.unflatten(1, (input.size(1) // (pooled[0] * pooled[1]), *pooled))
    out = []
    for index, x1, y1, x2, y2 in boxes.tolist():
        rows = columns = None
        if all(map(math.isfinite, (index, x1, y1, x2, y2))) and -1 < index < input.size(0):
            rows = axis(y1, y2, pooled[0], input.size(2))
            columns = axis(x1, x2, pooled[1], input.size(3))
        if rows is None or columns is None:
            out.append(input.sum() * 0 + input.new_zeros(planes.shape[1:4]))
        else:
            out.append(torch.einsum("ph,cpqhw,qw->cpq", rows, planes[int(index)], columns))
    return torch.stack(out) if out else input.new_zeros(0, *planes.shape[1:4]) + input.sum() * 0
