"""`GroupNorm` and `InstanceNorm2d`, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels.nn._activated import Activated
from pyvision_kernels.nn._layer import is_for_torch, is_traced
from pyvision_kernels.ops.group_norm import group_norm, run

# Leaves for torch.fx.
torch.fx.wrap("group_norm")
torch.fx.wrap("tracked_instance_norm")


def tracked_instance_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """PyTorch's, of a layer that tracks statistics, which a trace records as one."""
    output = F.instance_norm(input, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
    output = output if residual is None else output + residual
    return output if activation is None else _activation.FUNCTIONS[activation](output)


class GroupNorm(Activated, nn.GroupNorm):
    """`torch.nn.GroupNorm` by our kernels, with an activation in the same pass; same parameters and state_dict.

    Args:
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None, the
            default.
        Others: as of `torch.nn.GroupNorm`.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, ...] -> the same; a residual is added before the activation."""
        options: dict[str, Any] = {"residual": residual, "activation": self.activation}
        if is_traced(input):
            return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **options)
        if is_for_torch(input) or input.numel() == 0:
            return self.finished(input, super().forward(input), residual)
        try:
            return run(input, self.num_groups, self.weight, self.bias, self.eps, **options)
        except (RuntimeError, NotImplementedError):
            super().forward(input)  # where PyTorch refuses the input too, by its words
            raise


class InstanceNorm2d(Activated, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` by our kernels: every channel a group; as :class:`GroupNorm`.

    A layer that tracks running statistics is PyTorch's in all.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] or [C, H, W] -> the same; a residual is added before the activation."""
        options: dict[str, Any] = {"residual": residual, "activation": self.activation}
        if isinstance(input, torch.fx.Proxy):
            if self.track_running_stats:
                tensors = input, self.running_mean, self.running_var, self.weight, self.bias
                return tracked_instance_norm(*tensors, self.training, self.momentum, self.eps, **options)
            return group_norm(input, self.num_features, self.weight, self.bias, self.eps, **options)
        if (
            self.track_running_stats
            or input.dim() not in (3, 4)
            or input.shape[-3] != self.num_features
            or input.shape[-1] * input.shape[-2] <= 1
            or (is_for_torch(input) and not is_traced(input))
        ):
            return self.finished(input, super().forward(input), residual)
        if input.dim() == 3:
            rest = None if residual is None else residual.unsqueeze(0)
            return self.forward(input.unsqueeze(0), rest).squeeze(0)
        if is_traced(input):
            return group_norm(input, self.num_features, self.weight, self.bias, self.eps, **options)
        try:
            return run(input, self.num_features, self.weight, self.bias, self.eps, **options)
        except (RuntimeError, NotImplementedError):
            super().forward(input)  # where PyTorch refuses the input too, by its words
            raise
