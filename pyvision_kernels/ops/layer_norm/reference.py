"""layer_norm in readable PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Any:
    """layer_norm(input), or (layer_norm(input + residual), input + residual)."""
    shape = list(normalized_shape)
    if residual is None:
        return F.layer_norm(input, shape, weight, bias, eps)
    total = input + residual
    return F.layer_norm(total, shape, weight, bias, eps), total
