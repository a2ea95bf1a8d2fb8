"""group_norm in readable PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(group_norm(input) + residual)."""
    out = F.group_norm(input, num_groups, weight, bias, eps)
    if residual is not None:
        out = out + residual
    return _activation.apply(_activation.number_of("group_norm", activation), out)
