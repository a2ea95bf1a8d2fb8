"""Pairwise overlap of boxes in readable PyTorch: the definition, the oracle in float64, and the double backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORMATS = ("xyxy", "xywh", "cxcywh")
KINDS = ("plain", "generalized", "distance", "complete")


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """[..., N, 4], [..., M, 4] -> [..., N, M]: intersection over union."""
    return pairwise(boxes1, boxes2, "plain", fmt)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU less the share of the enclosing box that neither covers."""
    return pairwise(boxes1, boxes2, "generalized")


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU less the squared distance of the centres, by the enclosing box's squared diagonal."""
    return pairwise(boxes1, boxes2, "distance", eps=eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """That less the difference of the aspect ratios, weighted."""
    return pairwise(boxes1, boxes2, "complete", eps=eps)


def pairwise(boxes1: Tensor, boxes2: Tensor, kind: str, fmt: str = "xyxy", eps: float = 0.0) -> Tensor:
    low1, high1, size1 = (part.unsqueeze(-2) for part in _corners(boxes1, fmt))  # [..., N, 1, 2]
    low2, high2, size2 = (part.unsqueeze(-3) for part in _corners(boxes2, fmt))  # [..., 1, M, 2]
    inter = _area(_positive(torch.min(high1, high2) - torch.max(low1, low2)))
    union = _area(size1) + (_area(size2) - inter)
    iou = inter / union
    if kind == "plain":
        return iou
    enclosing = _positive(torch.max(high1, high2) - torch.min(low1, low2))
    if kind == "generalized":
        area = _area(enclosing)
        return iou - (area - union) / area
    distance = ((low1 + high1) / 2 - (low2 + high2) / 2).pow(2).sum(-1)
    diou = iou - distance / (enclosing.pow(2).sum(-1) + eps)
    if kind == "distance":
        return diou
    turn = torch.atan(size1[..., 0] / size1[..., 1]) - torch.atan(size2[..., 0] / size2[..., 1])
    v = 4 / math.pi**2 * turn.pow(2)
    alpha = (v / (1 - iou + v + eps)).detach()
    return diou - alpha * v


def _positive(length: Tensor) -> Tensor:
    """clamp(min=0), with the gradient zero at zero, of boxes that touch; that of clamp there is not every PyTorch's."""
    return torch.where(length > 0, length, length.detach().clamp(min=0))


def _corners(boxes: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """The low corners, the high ones and the sizes, [..., 2] each."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if fmt == "xyxy":
        return first, second, second - first
    if fmt == "xywh":
        return first, first + second, second
    return first - second / 2, first + second / 2, second


def _area(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]
