"""Losses of box regression in readable PyTorch: the definition, the oracle in float64, and the double backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("plain", "generalized", "distance", "complete")  # of box_iou; there is no plain loss
REDUCTIONS = ("none", "mean", "sum")


def generalized_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """[..., 4], [..., 4] -> [...]: one minus the generalized IoU."""
    return loss(boxes1, boxes2, "generalized", reduction, eps)


def distance_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """One minus the distance IoU."""
    return loss(boxes1, boxes2, "distance", reduction, eps)


def complete_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """One minus the complete IoU, whose `eps` is alpha's; the other denominators have 1e-7."""
    return loss(boxes1, boxes2, "complete", reduction, eps)


def loss(boxes1: Tensor, boxes2: Tensor, kind: str, reduction: str, eps: float) -> Tensor:
    each = _loss(boxes1, boxes2, kind, eps)
    if reduction == "none":
        return each
    if reduction == "mean" and each.numel() > 0:
        return each.mean()
    return each.sum()


def _loss(boxes1: Tensor, boxes2: Tensor, kind: str, alpha_eps: float) -> Tensor:
    eps = 1e-7 if kind == "complete" else alpha_eps
    low1, high1, low2, high2 = boxes1[..., :2], boxes1[..., 2:], boxes2[..., :2], boxes2[..., 2:]
    size1, size2 = high1 - low1, high2 - low2
    side = torch.min(high1, high2) - torch.max(low1, low2)
    # Two choices, so that a product that is not finite has no gradient where it is not chosen.
    meets = (side > 0).all(-1, keepdim=True)
    inter = _area(torch.where(meets, side, 0.0))
    union = _area(size1) + _area(size2) - inter
    iou = inter / (union + eps)
    enclosing = torch.max(high1, high2) - torch.min(low1, low2)
    if kind == "generalized":
        area = _area(enclosing)
        return 1 - (iou - (area - union) / (area + eps))
    distance = ((low1 + high1) / 2 - (low2 + high2) / 2).pow(2).sum(-1)
    each = 1 - iou + distance / (enclosing.pow(2).sum(-1) + eps)
    if kind == "distance":
        return each
    turn = torch.atan(size2[..., 0] / size2[..., 1]) - torch.atan(size1[..., 0] / size1[..., 1])
    v = 4 / math.pi**2 * turn.pow(2)
    alpha = (v / (1 - iou + v + alpha_eps)).detach()
    return each + alpha * v


def _area(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]
