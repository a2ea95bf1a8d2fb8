"""`Conv2d` and `Conv1d`, in place of torch.nn's."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels._packed import PacksOf
from pyvision_kernels.nn._layer import Layer, is_for_torch, is_traced, parameters_of
from pyvision_kernels.ops.conv2d import conv1d, conv2d, run
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.variants import run_row

# Leaves for torch.fx.
torch.fx.wrap("conv1d")
torch.fx.wrap("conv2d")

_arguments_of = itemgetter("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size")


def geometry_of(layer: Any) -> Geometry:
    """The checked arguments of a convolution; kept until one of them is set to something else."""
    arguments = _arguments_of(layer.__dict__)
    packs = layer._kept()
    seen, geometry = packs.geometry
    if seen != arguments:
        if isinstance(layer, nn.Conv1d):
            stride, padding, dilation, groups, mode, (taps,) = arguments
            geometry = Geometry.of_row(stride, padding, dilation, groups, mode, taps, "conv1d")
        else:
            geometry = Geometry.of(*arguments)
        packs.geometry = arguments, geometry
    return geometry


class Conv2d(Layer, nn.Conv2d):
    """`torch.nn.Conv2d` by our kernels, with an activation in the same pass; same parameters and state_dict.

    In eval mode the weight is kept as the kernels read it, and packed anew after any write that PyTorch counts; see
    :meth:`repack` for the others.

    Args:
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None, the
            default.
        Others: as of `torch.nn.Conv2d`.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W] -> the same with K channels."""
        if is_for_torch(input):
            return self._activated(super().forward(input))
        if is_traced(input):
            arguments = self.stride, self.padding, self.dilation, self.groups
            options: dict[str, Any] = {"activation": self.activation, "padding_mode": self.padding_mode}
            return conv2d(input, self.weight, self.bias, *arguments, **options)
        weight, bias, packs = parameters_of(self)
        maps = input if input.dim() == 4 else input.unsqueeze(0)
        try:
            output = run(maps, weight, bias, geometry_of(self), activation=self.activation, packs=packs)
        except (RuntimeError, IndexError):
            super().forward(input)  # where PyTorch refuses the input too, by its words
            raise
        return output if maps is input else output.squeeze(0)


class Conv1d(Layer, nn.Conv1d):
    """`torch.nn.Conv1d` by the kernels of conv2d; as :class:`Conv2d`.

    Args:
        activation (str): As of :class:`Conv2d`.
        Others: as of `torch.nn.Conv1d`.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, L] or [C, L] -> the same with K channels."""
        if is_for_torch(input):
            return self._activated(super().forward(input))
        if is_traced(input):
            arguments = self.stride, self.padding, self.dilation, self.groups
            options: dict[str, Any] = {"activation": self.activation, "padding_mode": self.padding_mode}
            return conv1d(input, self.weight, self.bias, *arguments, **options)
        weight, bias, packs = parameters_of(self)
        row_packs = None if packs is None else PacksOf(packs, weight)
        try:
            return run_row(input, weight, bias, geometry_of(self), activation=self.activation, packs=row_packs)
        except (RuntimeError, IndexError):
            super().forward(input)
            raise
