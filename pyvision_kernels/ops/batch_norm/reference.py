"""batch_norm in readable PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(batch_norm(input) + residual)."""
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        out = out + residual
    return _activation.apply(_activation.number_of("batch_norm", activation), out)
