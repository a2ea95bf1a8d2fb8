"""linear in readable PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(input @ weight.T + bias + residual)."""
    out = F.linear(input, weight, bias)
    if residual is not None:
        out = out + residual
    return _activation.apply(_activation.number_of("linear", activation), out)
