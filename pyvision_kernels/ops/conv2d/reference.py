"""conv2d and its relatives in readable PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels.ops.conv2d.geometry import PADDING_MODES, Geometry


def padded(input: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, H, W] with the borders that the taps read."""
    modes = {number: mode for mode, number in PADDING_MODES.items()}
    mode = modes[geometry.padding_mode]
    if not any(geometry.padding):
        return input
    return F.pad(input, geometry.padding, "constant" if mode == "zeros" else mode)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    padding_mode: str = "zeros",
) -> Tensor:
    """activation(scale * (conv(input) + bias) + shift + residual), by PyTorch's steps one after another."""
    geometry = Geometry.of(stride, padding, dilation, groups, padding_mode, weight.shape[-2:])
    if input.dim() == 3:
        rest = None if residual is None else residual.unsqueeze(0)
        options: dict[str, Any] = {"scale": scale, "shift": shift, "residual": rest, "activation": activation}
        return conv2d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode, **options
        ).squeeze(0)
    left, right, top, bottom = geometry.padding
    if geometry.padding_mode == 0 and (left, top) == (right, bottom):
        out = F.conv2d(input, weight, bias, geometry.stride, (top, left), geometry.dilation, groups)
    else:
        out = F.conv2d(padded(input, geometry), weight, bias, geometry.stride, 0, geometry.dilation, groups)
    if scale is not None:
        out = out * scale.view(-1, 1, 1)
    if shift is not None:
        out = out + shift.view(-1, 1, 1)
    if residual is not None:
        out = out + residual
    return _activation.apply(_activation.number_of("conv2d", activation), out)


def conv2d_max_pool2d(input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
    """conv2d, then the maximum of each 2 x 2 pixels."""
    return F.max_pool2d(conv2d(input, weight, *args, **kwargs), 2)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    padding_mode: str = "zeros",
) -> Tensor:
    """conv2d of maps with one row."""
    geometry = Geometry.of_row(stride, padding, dilation, groups, padding_mode, weight.shape[2], "conv1d")
    rows, taps = (input if input.dim() == 3 else input.unsqueeze(0)).unsqueeze(2), weight.unsqueeze(2)
    numbers = (geometry.stride, geometry.padding, geometry.dilation, groups)
    out = conv2d(rows, taps, bias, *numbers, activation=activation, padding_mode=padding_mode).squeeze(2)
    return out if input.dim() == 3 else out.squeeze(0)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    out = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _activation.apply(_activation.number_of("conv_transpose2d", activation), out)
