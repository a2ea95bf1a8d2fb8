"""Non-maximum suppression in readable PyTorch: the definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """[N, 4], [N] -> [M]. Greedy, in descending order of score, ties by index; computed in the dtype of boxes."""
    order = scores.sort(stable=True, descending=True).indices
    boxes = boxes[order]
    suppressed = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    keep = []
    for i in range(len(order)):
        if suppressed[i]:
            continue
        keep.append(i)
        suppressed[i + 1 :] |= _iou(boxes[i], boxes[i + 1 :]).double() > iou_threshold
    return order[torch.tensor(keep, dtype=torch.int64, device=boxes.device)]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """[N, 4], [N], [N] -> [M]. Each class by itself, then all by descending score."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=boxes.device)
    for group in idxs.unique():
        members = (idxs == group).nonzero()[:, 0]
        kept[members[nms(boxes[members], scores[members], iou_threshold)]] = True
    order = scores.sort(stable=True, descending=True).indices
    return order[kept[order]]


def batched_nms_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """[B, N, 4], [B, N], [B, N] -> [B, max_output], [B]. Without the boxes whose score is -inf."""
    keep = torch.full((len(boxes), max_output), -1, dtype=torch.int64, device=boxes.device)
    count = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for image in range(len(boxes)):
        present = (scores[image] != -math.inf).nonzero()[:, 0]
        given = boxes[image][present], scores[image][present]
        groups = idxs[image][present] if idxs is not None else torch.zeros_like(present)
        kept = batched_nms(*given, groups, iou_threshold)
        kept = present[kept[:max_output]]
        keep[image, : len(kept)] = kept
        count[image] = len(kept)
    return keep, count


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    idxs: Tensor | None = None,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    method: str = "gaussian",
) -> tuple[Tensor, Tensor]:
    """[N, 4], [N], [N] -> [M], [M]. Scores decay in the dtype of scores, the exponential rounded to it."""
    remaining = scores.clone()
    keep, kept_scores = [], []
    for _ in range(len(scores)):
        best = torch.where(remaining.double() > score_threshold, remaining, -math.inf).argmax()  # of equals, the first
        if not remaining[best].double() > score_threshold:
            break
        keep.append(best)
        kept_scores.append(remaining[best].clone())
        remaining[best] = -math.inf
        iou = _iou(boxes[best], boxes)
        if method == "gaussian":
            decayed, concerned = remaining * torch.exp(-iou.double().square() / sigma).to(iou.dtype), iou > 0
        else:
            decayed, concerned = remaining * (1 - iou), iou.double() > iou_threshold
        if idxs is not None:
            concerned &= idxs == idxs[best]
        remaining = torch.where(concerned & (iou > 0), decayed, remaining)
    if not keep:
        return torch.empty(0, dtype=torch.int64, device=boxes.device), scores.new_empty(0)
    return torch.stack(keep), torch.stack(kept_scores)


def _iou(box: Tensor, others: Tensor) -> Tensor:
    """[4], [N, 4] -> [N]. where(), not maximum(): a comparison with NaN is false, as in the kernels."""
    x1, y1, x2, y2 = others.unbind(1)
    left, top = _larger(box[0], x1), _larger(box[1], y1)
    right, bottom = _smaller(box[2], x2), _smaller(box[3], y2)
    zero = others.new_zeros(())
    inter = _larger(zero, right - left) * _larger(zero, bottom - top)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return inter / (area + (x2 - x1) * (y2 - y1) - inter)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, b, a)


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b < a, b, a)
