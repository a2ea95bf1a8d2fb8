"""Sigmoid focal loss in readable PyTorch: the definition, and the oracle in float64."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """`alpha_t * (1 - p_t)^gamma * cross_entropy`, from log p and log(1 - p), so that nothing cancels."""
    log_p, log_q = logsigmoid(inputs), logsigmoid(-inputs)
    cross_entropy = -log_p * targets - log_q * (1 - targets)
    missed = log_p.exp() * (1 - targets) + log_q.exp() * targets
    power = missed.where(missed != 0, 1.0) ** gamma  # 0^gamma has no derivative where gamma < 1
    loss = cross_entropy * (power if gamma == 0 else power.where(missed != 0, 0.0))
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
