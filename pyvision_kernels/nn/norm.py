"""`LayerNorm`, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.nn._layer import is_for_torch, is_traced
from pyvision_kernels.ops.layer_norm import layer_norm, run

# A leaf for torch.fx.
torch.fx.wrap("layer_norm")


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` by our kernels; same arguments, parameters and state_dict."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """[..., *normalized_shape] -> the same; with a residual (the sum normalised, the sum)."""
        if is_traced(input):
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual)
        if is_for_torch(input):
            if residual is None:
                return super().forward(input)
            total = input + residual
            return super().forward(total), total
        try:
            return run(input, self.normalized_shape, self.weight, self.bias, self.eps, residual)
        except (RuntimeError, NotImplementedError):
            super().forward(input)  # where PyTorch refuses the input too, by its words
            raise
