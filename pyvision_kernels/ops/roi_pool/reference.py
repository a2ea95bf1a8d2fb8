"""RoI max pooling in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def roi_pool(input: Tensor, boxes: Tensor, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> Tensor:
    """[N, C, H, W], [K, 5] -> [K, C, PH, PW]. Bins are found in the dtype of ``input``."""
    pooled = (output_size, output_size) if isinstance(output_size, int) else output_size
    edges = boxes[:, 1:].to(input.dtype) * torch.tensor(spatial_scale, dtype=input.dtype)
    out = []
    for index, (x1, y1, x2, y2) in zip(boxes[:, 0].tolist(), edges.tolist(), strict=True):
        rows = columns = None
        if all(map(math.isfinite, (index, x1, y1, x2, y2))) and -1 < index < input.size(0):
            rows = _axis(y1, y2, pooled[0], input.size(2), input.dtype)
            columns = _axis(x1, x2, pooled[1], input.size(3), input.dtype)
        if rows is None or columns is None:
            out.append(input.sum() * 0 + input.new_zeros(input.size(1), *pooled))
            continue
        image = input[int(index)]
        bins = [_maximum(image[:, y0:y1, x0:x1]) for y0, y1 in rows for x0, x1 in columns]
        out.append(torch.stack(bins, 1).unflatten(1, pooled))
    return torch.stack(out) if out else input.new_zeros(0, input.size(1), *pooled) + input.sum() * 0


def _maximum(bin: Tensor) -> Tensor:
    """[C, h, w] -> [C]: of what is greater than LOWEST; 0 where there is no pixel."""
    if bin[0:1].numel() == 0:
        return bin.sum((1, 2))
    pixels = bin.flatten(1)
    candidates = torch.where(pixels > LOWEST, pixels, LOWEST)
    is_largest = candidates == candidates.amax(1, keepdim=True)
    order = torch.arange(pixels.size(1), 0, -1, device=bin.device)
    place = (is_largest * order).argmax(1, keepdim=True)  # the first of equal values
    return candidates.gather(1, place).squeeze(1)


def _axis(low: float, high: float, bins: int, size: int, dtype: torch.dtype) -> list[tuple[int, int]] | None:
    """The pixels [begin, end) of each bin; None where the box has no finite length."""
    start = _round_half_away(low)
    length = torch.tensor(float(max(_round_half_away(high) - start + 1, 1)), dtype=dtype)
    if not length.isfinite():
        return None
    step = length / bins
    edges = []
    for p in range(bins):
        begin = start + _whole(math.floor, torch.tensor(p, dtype=dtype) * step)
        end = start + _whole(math.ceil, torch.tensor(p + 1, dtype=dtype) * step)
        edges.append((min(max(begin, 0), size), min(max(end, 0), size)))
    return edges


def _whole(rounding, value: Tensor) -> int:
    return rounding(value.item()) if value.isfinite() else 2**1100  # beyond every map


def _round_half_away(value: float) -> int:
    whole = int(abs(value))
    return int(math.copysign(1, value)) * (whole + (abs(value) - whole >= 0.5))
