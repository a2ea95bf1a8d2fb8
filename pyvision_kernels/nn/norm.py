"""`LayerNorm`, `BatchNorm1d` and `BatchNorm2d`, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.nn._activated import Activated
from pyvision_kernels.nn._layer import is_for_torch, is_traced
from pyvision_kernels.ops.batch_norm import batch_norm
from pyvision_kernels.ops.batch_norm import is_for_torch as is_for_torchs_batch_norm
from pyvision_kernels.ops.batch_norm import run as run_batch_norm
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


def batch_norm_and_count(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A training step of a layer that tracks statistics, which a trace records as one."""
    batches.add_(1)
    momentum = 1.0 / float(batches) if momentum is None else momentum  # None: the average of all batches
    statistics = running_mean, running_var, weight, bias
    return batch_norm(input, *statistics, True, momentum, eps, residual=residual, activation=activation)


torch.fx.wrap("batch_norm_and_count")


class _BatchNorm(Activated, nn.modules.batchnorm._BatchNorm):
    """The forward of `torch.nn`'s batch norms with our kernels, in front of one of them."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, ...] -> the same; a residual is added before the activation."""
        traced = is_traced(input)
        if not traced and (is_for_torch(input) or is_for_torchs_batch_norm(input, self.weight, self.training)):
            return self.finished(input, super().forward(input), residual)
        training = self.training
        if not isinstance(input, torch.fx.Proxy):
            self._check_input_dim(input)
            channels = input.shape[1]
            if channels != self.num_features or (training and input.numel() == channels):
                return super().forward(input)  # where PyTorch refuses the input, by its words
        momentum = 0.0 if self.momentum is None else self.momentum
        mean, var = self.running_mean, self.running_var
        if training and self.track_running_stats:
            if isinstance(input, torch.fx.Proxy) and mean is not None and self.num_batches_tracked is not None:
                tracked = mean, var, self.num_batches_tracked, self.weight, self.bias
                return batch_norm_and_count(input, *tracked, self.momentum, self.eps, residual, self.activation)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:  # the average of all batches
                    momentum = 1.0 / float(self.num_batches_tracked)
        elif training:
            mean = var = None
        by_batch = training or (mean is None and var is None)
        arguments = input, mean, var, self.weight, self.bias, by_batch, momentum, self.eps
        if traced:
            return batch_norm(*arguments, residual=residual, activation=self.activation)
        return run_batch_norm(*arguments, residual, self.activation)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` by our kernels, with an activation in the same pass; same parameters and state_dict.

    Args:
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None, the
            default.
        Others: as of `torch.nn.BatchNorm1d`.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` by our kernels; as :class:`BatchNorm1d`."""
