"""`GroupNorm` and `InstanceNorm2d`, in place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels import _activation
from pyvision_kernels.nn._layer import is_for_torch, is_traced
from pyvision_kernels.ops.group_norm import group_norm, run

# A leaf for torch.fx.
torch.fx.wrap("group_norm")


class _Activated(nn.Module):
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

    def _finished(self, output: Tensor, residual: Tensor | None) -> Tensor:
        """The result of a stock layer, with what follows."""
        if residual is not None:
            output = output + residual
        return output if self.activation is None else _activation.FUNCTIONS[self.activation](output)


class GroupNorm(_Activated, nn.GroupNorm):
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
        if is_for_torch(input):
            return self._finished(super().forward(input), residual)
        try:
            return run(input, self.num_groups, self.weight, self.bias, self.eps, **options)
        except (RuntimeError, NotImplementedError):
            super().forward(input)  # where PyTorch refuses the input too, by its words
            raise


class InstanceNorm2d(_Activated, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` by our kernels: every channel a group; as :class:`GroupNorm`.

    A layer that tracks running statistics is PyTorch's in all.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] or [C, H, W] -> the same; a residual is added before the activation."""
        options: dict[str, Any] = {"residual": residual, "activation": self.activation}
        if isinstance(input, torch.fx.Proxy):
            return group_norm(input, self.num_features, self.weight, self.bias, self.eps, **options)
        if (
            self.track_running_stats
            or input.dim() not in (3, 4)
            or input.shape[-3] != self.num_features
            or input.shape[-1] * input.shape[-2] <= 1
            or (is_for_torch(input) and not is_traced(input))
        ):
            return self._finished(super().forward(input), residual)
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
