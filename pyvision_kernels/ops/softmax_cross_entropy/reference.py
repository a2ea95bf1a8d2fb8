"""Softmax cross entropy in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def wanted(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position and class what the target asks for, of each position its part in a mean's divisor, and whether
    it counts; classes come last."""
    logits = input if input.dim() == 1 else input.movedim(1, -1)
    classes = logits.shape[-1]
    weight = torch.ones(classes, dtype=input.dtype, device=input.device) if weight is None else weight.to(input.dtype)
    if target.is_floating_point():
        share = target if target.dim() == 1 else target.movedim(1, -1)
        divisor = counts = torch.ones_like(share[..., 0], dtype=input.dtype)
    else:
        counts = (target != ignore_index).to(input.dtype)
        label = target.where(target != ignore_index, 0).long()
        share = (label.unsqueeze(-1) == torch.arange(classes, device=input.device)).to(input.dtype)
        divisor = weight[label] * counts
    smooth = share * (1 - label_smoothing) + label_smoothing / classes
    return smooth * weight, divisor, counts != 0


def softmax_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`- sum of q * log softmax(input)` over the classes, q what the target asks for."""
    q, divisor, counts = wanted(input, target, weight, ignore_index, label_smoothing)
    log_p = (input if input.dim() == 1 else input.movedim(1, -1)).log_softmax(-1)
    if not target.is_floating_point() and label_smoothing == 0:
        log_p = log_p.where(q != 0, 0.0)  # what is not asked for may be infinite
    loss = (-(q * log_p).sum(-1)).where(counts, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / divisor.sum() if reduction == "mean" else loss.sum()
