"""`Linear`, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.nn._layer import Layer, is_for_torch, is_traced, parameters_of
from pyvision_kernels.ops.linear import linear, run

# A leaf for torch.fx.
torch.fx.wrap("linear")


class Linear(Layer, nn.Linear):
    """`torch.nn.Linear` by our kernels, with an activation in the same pass; as :class:`Conv2d`.

    Args:
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None, the
            default.
        Others: as of `torch.nn.Linear`.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., K]."""
        if is_for_torch(input):
            return self._activated(super().forward(input))
        if is_traced(input):
            return linear(input, self.weight, self.bias, activation=self.activation)
        weight, bias, packs = parameters_of(self)
        try:
            return run(input, weight, bias, activation=self.activation, packs=packs)
        except (RuntimeError, IndexError):
            super().forward(input)  # where PyTorch refuses the input too, by its words
            raise
