"""Non-maximum suppression in readable PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """[N, 4], [N] -> [M]. Greedy, in descending order of score, ties by index; computed in the dtype of boxes."""
    order = scores.sort(stable=True, descending=True).indices
    x1, y1, x2, y2 = boxes[order].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    suppressed = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    keep = []
    for i in range(len(order)):
        if suppressed[i]:
            continue
        keep.append(i)
        later = slice(i + 1, None)
        # where(), not maximum(): a comparison with NaN is false, as in the kernels.
        left, top = _larger(x1[i], x1[later]), _larger(y1[i], y1[later])
        right, bottom = _smaller(x2[i], x2[later]), _smaller(y2[i], y2[later])
        zero = boxes.new_zeros(())
        inter = _larger(zero, right - left) * _larger(zero, bottom - top)
        iou = inter / (area[i] + area[later] - inter)
        suppressed[later] |= iou.double() > iou_threshold
    return order[torch.tensor(keep, dtype=torch.int64, device=boxes.device)]


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, b, a)


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b < a, b, a)
