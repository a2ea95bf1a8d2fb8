"""What normalisation layers of ours share: an activation, and a residual before it."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels import _activation
from pyvision_kernels._check import autocasts
from pyvision_kernels._norm import check_residual


class Activated(nn.Module):
    """Beside a stock class, in front of it; an instance may come by its `__class__`."""

    # In `__dict__` where it is set.
    activation: str | None = None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _activation.number_of(type(self).__name__, activation)
        if activation is not None:
            self.activation = activation

    def extra_repr(self) -> str:
        stock = super().extra_repr()
        return stock if self.activation is None else f"{stock}, activation={self.activation!r}"

    def finished(self, input: Tensor, output: Tensor, residual: Tensor | None) -> Tensor:
        """The output of a stock layer, with what follows."""
        if residual is not None:
            if not isinstance(input, torch.fx.Proxy) and not autocasts(input):
                check_residual(type(self).__name__, residual, input)
            output = output + residual
        return output if self.activation is None else _activation.FUNCTIONS[self.activation](output)
