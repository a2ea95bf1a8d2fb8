"""`LayerNorm`, `BatchNorm1d` and `BatchNorm2d`, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels import _activation
from pyvision_kernels.nn._layer import is_for_torch, is_traced
from pyvision_kernels.ops.batch_norm import batch_norm
from pyvision_kernels.ops.layer_norm import layer_norm, run

# Leaves for torch.fx.
torch.fx.wrap("batch_norm")
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


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The forward of `torch.nn`'s batch norms with our kernels, in front of one of them."""

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

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, ...] -> the same; a residual is added before the activation."""
        if is_for_torch(input) and not is_traced(input):
            output = super().forward(input)
            if residual is not None:
                output = output + residual
            return output if self.activation is None else _activation.FUNCTIONS[self.activation](output)
        if not isinstance(input, torch.fx.Proxy):
            self._check_input_dim(input)
            channels = input.shape[1]
            if channels != self.num_features or (self.training and input.numel() == channels):
                return super().forward(input)  # where PyTorch refuses the input, by its words
        momentum = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        uses = not self.training or self.track_running_stats
        return batch_norm(
            input,
            self.running_mean if uses else None,
            self.running_var if uses else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            residual=residual,
            activation=self.activation,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` by our kernels, with an activation in the same pass; same parameters and state_dict.

    Args:
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None, the
            default.
        Others: as of `torch.nn.BatchNorm1d`.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` by our kernels; as :class:`BatchNorm1d`."""
