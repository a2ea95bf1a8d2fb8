"""The weights of attention by themselves, which the fused pass never holds: by PyTorch's operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvision_kernels._norm import opmath


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * query @ key.T + bias), [B, H, L, S], as `attention` has them; scores in float32 or wider.

    bias: [B or 1, H or 1, L or 1, S].
    """
    wide = opmath(query.dtype)
    if bias is None:
        return (scale * (query.to(wide) @ key.to(wide).mT)).softmax(-1).to(query.dtype)
    seen = bias if bias.dtype == torch.bool else bias != -math.inf
    nothing = ~seen.any(-1, keepdim=True)
    present = key.masked_fill(~seen.any(-2)[..., None], 0)  # padding may be NaN
    scores = scale * (query.to(wide) @ present.to(wide).mT)
    if bias.dtype != torch.bool:
        scores = scores + bias
    weights = scores.masked_fill(~seen, -math.inf).masked_fill(nothing, 0).softmax(-1)
    return weights.masked_fill(nothing, 0).to(query.dtype)
