"""Convolutions: the public functions conv2d and conv2d_max_pool2d; conv1d and conv_transpose2d are variants."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._check import require, require_tensors
from pyvision_kernels.ops.conv2d import triton  # noqa: F401  # declares operators
from pyvision_kernels.ops.conv2d.geometry import Geometry, Padding
from pyvision_kernels.ops.conv2d.operator import run
from pyvision_kernels.ops.conv2d.variants import conv1d, conv_transpose2d

Options = tuple[Any, ...]  # stride, padding, dilation, groups, padding_mode, activation
_checked: dict[tuple[Any, ...], Geometry] = {}
_MOST_CHECKED = 4096


def _check(op: str, input: Any, weight: Any, options: Options) -> Geometry:
    """What only the public functions are given; remembered where it can be hashed, for most calls are repeated."""
    require_tensors(op, input=input, weight=weight)
    stride, padding, dilation, groups, padding_mode, activation = options
    _activation.number_of(op, activation)
    require(weight.dim() == 4, op, "weight to have 4 dimensions [K, C / groups, R, S]", weight.shape)
    require(input.dim() in (3, 4), op, "input to have 4 dimensions [N, C, H, W], or 3 without N", input.shape)
    geometry = Geometry.of(stride, padding, dilation, groups, padding_mode, weight.shape[2:], op)
    if not torch.compiler.is_compiling() and all(type(item) in (int, tuple, str, NoneType) for item in options):
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        _checked[op, input.dim(), weight.shape, options] = geometry
    return geometry


def _call(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    try:
        geometry = _checked[op, input.dim(), weight.shape, options]
    except (KeyError, TypeError, AttributeError):
        geometry = _check(op, input, weight, options)
    for name, value in (("bias", bias), ("scale", scale), ("shift", shift), ("residual", residual)):
        if value is not None:
            require_tensors(op, **{name: value})
    activation, pool = options[5], op == "conv2d_max_pool2d"
    if input.dim() == 4:
        return run(input, weight, bias, geometry, scale, shift, residual, activation, pool)
    if residual is not None:
        require(residual.dim() == 3, op, "residual to have 3 dimensions as input has", residual.shape)
        residual = residual.unsqueeze(0)
    return run(input.unsqueeze(0), weight, bias, geometry, scale, shift, residual, activation, pool).squeeze(0)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    padding_mode: str = "zeros",
) -> Tensor:
    """Convolution, with a batch norm, a residual and an activation in the same pass.

    ``activation(scale * (conv(input, weight) + bias) + shift + residual)``. Matches
    `torch.nn.functional.conv2d`; what comes after it is in float32 for 16-bit types, and rounded once.

    Args:
        input (Tensor[N, C, H, W] or [C, H, W]): float16, bfloat16, float32 or float64; any strides.
        weight (Tensor[K, C / groups, R, S]): Of input's dtype; any strides.
        bias (Tensor[K]): Of input's dtype, or float32 beside a 16-bit input; as scale and shift.
        stride (int or pair): Of rows, of columns. Default: 1.
        padding (int, pair, four or str): Pixels around the input; a pair (rows, columns), four (left, right, top,
            bottom), ``"valid"`` (none) or ``"same"`` (as many pixels out as in; stride 1). Default: 0.
        dilation (int or pair): Pixels from tap to tap. Default: 1.
        groups (int): Parts of channels that are convolved apart. Default: 1.
        scale, shift (Tensor[K]): Of a folded batch norm.
        residual (Tensor[N, K, OH, OW]): Added before the activation; of input's dtype, any strides.
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None.
        padding_mode (str): ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``. Default: ``"zeros"``.

    Returns:
        Tensor[N, K, OH, OW] of input's dtype; channels_last where input or weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        ValueError: an option is none of these.
        TypeError: an argument is of another type.

    Note: deterministic. The gradient is by PyTorch's operators, and differentiable again. Which kernel runs follows
    from the shape (`pvk.explain`); 3 x 3 in float32 is by Winograd, see `pvk.strict_numerics`.
    Reference: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016.
    """
    options = (stride, padding, dilation, groups, padding_mode, activation)
    return _call("conv2d", input, weight, bias, options, scale, shift, residual)


def conv2d_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    padding_mode: str = "zeros",
) -> Tensor:
    """conv2d and the maximum of each 2 x 2 pixels of it, in one pass: the map before pooling is never written.

    ``max_pool2d(conv2d(...), 2)``: windows of 2 x 2 with stride 2; a last odd row or column is left out.

    Args:
        As of `conv2d`; residual has the size before pooling.

    Returns:
        Tensor[N, K, OH // 2, OW // 2]; as of `conv2d`.

    Raises:
        As `conv2d`.

    Note: deterministic; as of `conv2d`.
    Reference: torch.nn.functional.max_pool2d.
    """
    options = (stride, padding, dilation, groups, padding_mode, activation)
    return _call("conv2d_max_pool2d", input, weight, bias, options, scale, shift, residual)


__all__ = ["conv1d", "conv2d", "conv2d_max_pool2d", "conv_transpose2d", "run"]
