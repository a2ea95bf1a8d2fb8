"""RoI align in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """[N, C, H, W], [K, 5] -> [K, C, PH, PW]. Sampling is separable: a bin is `rows @ image @ columns.T`."""
    height, width = input.shape[2:]
    pooled = (output_size, output_size) if isinstance(output_size, int) else output_size
    out = []
    for index, x1, y1, x2, y2 in boxes.tolist():
        rows = columns = None
        if all(map(math.isfinite, (index, x1, y1, x2, y2))) and -1 < index < input.size(0):
            rows = _axis(y1, y2, pooled[0], height, spatial_scale, sampling_ratio, aligned, input)
            columns = _axis(x1, x2, pooled[1], width, spatial_scale, sampling_ratio, aligned, input)
        if rows is None or columns is None:
            out.append(input.sum() * 0 + input.new_zeros(input.size(1), *pooled))
        else:
            out.append(torch.einsum("ph,chw,qw->cpq", rows, input[int(index)], columns))
    return torch.stack(out) if out else input.new_zeros(0, input.size(1), *pooled) + input.sum() * 0


def _axis(
    low: float, high: float, bins: int, size: int, scale: float, sampling_ratio: int, aligned: bool, like: Tensor
) -> Tensor | None:
    """[bins, size]: the weight of each pixel in each bin's average; None where there is no sample."""
    start = low * scale - 0.5 * aligned
    length = high * scale - 0.5 * aligned - start
    if not aligned:
        length = max(length, 1.0)
    samples = sampling_ratio if sampling_ratio > 0 else max(math.ceil(length / bins), 0)
    if samples == 0 or size == 0:
        return None
    matrix = []
    for p in range(bins):
        base, step = start + p * length / bins, length / bins / samples
        first, last = 0, samples
        if samples > 4 * size + 16:  # a huge box: only the samples that can be on the map
            middle = (size / 2 - base) / step
            first = max(0, min(samples, math.floor(middle - size - 4)))
            last = max(0, min(samples, first + 2 * size + 8))
        position = (
            base + (torch.arange(last - first, dtype=torch.float64, device=like.device) + float(first) + 0.5) * step
        )
        inside = (position >= -1) & (position <= size)
        position = position.clamp(0, size - 1)
        pixel = torch.arange(size, device=like.device)
        weight = (1 - (position[:, None] - pixel).abs()).clamp(min=0) * inside[:, None]  # [samples, size]
        matrix.append(weight.sum(0) / float(samples))
    return torch.stack(matrix).to(like.dtype)


def multiscale_roi_align(
    features: list[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    scales: list[float],
    sampling_ratio: int = 2,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    aligned: bool = False,
) -> Tensor:
    """Maps [N, C, H_l, W_l], [K, 5] or a list of [K_i, 4] -> [K, C, PH, PW]: box after box, from its own map."""
    if not isinstance(boxes, Tensor):
        boxes = torch.cat([torch.cat([torch.full_like(item[:, :1], i), item], 1) for i, item in enumerate(boxes)])
    nothing = sum(item.sum() * 0 for item in features)
    pooled = [roi_align(features[0], boxes[:0], output_size, scales[0], sampling_ratio, aligned)]
    for box in boxes:
        level = box_level(box[1:].tolist(), scales, canonical_scale, canonical_level)
        if level is None:  # a batch index out of range gives zeros
            box, level = torch.full_like(box, -1), 0
        pooled.append(roi_align(features[level], box[None], output_size, scales[level], sampling_ratio, aligned))
    return torch.cat(pooled) + nothing


def box_level(box: list[float], scales: list[float], canonical_scale: float, canonical_level: float) -> int | None:
    """The index of the map that the box is pooled from; None where it has none."""
    if len(scales) == 1:
        return 0
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    if not area >= 0:  # NaN too
        return None
    k_min, k_max = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    level = canonical_level + math.log2(math.sqrt(area) / canonical_scale) + 1e-6 if area > 0 else -math.inf
    index = int(min(max(math.floor(level) if math.isfinite(level) else level, k_min), k_max)) - k_min
    return index if index < len(scales) else None
