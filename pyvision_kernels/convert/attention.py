"""What `convert` makes of the reference attention, which calls PyTorch's in its own code."""

from __future__ import annotations

from torch import Tensor

from pyvision_kernels import models
from pyvision_kernels.ops.attention.luong import dot_attention


class Attention(models.Attention):
    """`pvk.models.Attention` over sequences by our kernels."""

    def _over_states(self, query: Tensor, enc: Tensor) -> Tensor:
        return dot_attention(query, enc)
