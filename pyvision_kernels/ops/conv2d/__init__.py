"""Convolutions: the public functions conv2d and conv2d_max_pool2d; conv1d and conv_transpose2d are variants."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._check import require, require_tensors
from pyvision_kernels.ops.conv2d.geometry import Geometry, Padding
from pyvision_kernels.ops.conv2d.operator import run
from pyvision_kernels.ops.conv2d.variants import conv1d, conv_transpose2d


_OPTIONAL = (Tensor, NoneType)


def _public(
    op: str, input: Any, weight: Any, bias: Any, options: tuple[Any, ...], given: dict[str, Any], activation: str | None
) -> Tensor:
    """Checks what only the public functions are given; takes maps without a batch dimension."""
    pool = op == "conv2d_max_pool2d"
    optional = {"bias": bias, **given}
    if not all(isinstance(value, _OPTIONAL) for value in optional.values()) or not isinstance(input, Tensor):
        require_tensors(op, input=input, **{name: value for name, value in optional.items() if value is not None})
    require_tensors(op, weight=weight)
    if activation is not None:
        _activation.number_of(op, activation)
    require(weight.dim() == 4, op, "weight to have 4 dimensions [K, C / groups, R, S]", weight.shape)
    geometry = Geometry.of(*options, weight.shape[2:], op)
    if input.dim() == 4:
        return run(input, weight, bias, geometry, pool=pool, activation=activation, **given)
    require(input.dim() == 3, op, "input to have 4 dimensions [N, C, H, W], or 3 without N", input.shape)
    residual = given["residual"]
    if residual is not None:
        require(residual.dim() == 3, op, "residual to have 3 dimensions as input has", residual.shape)
        given["residual"] = residual.unsqueeze(0)
    return run(input.unsqueeze(0), weight, bias, geometry, pool=pool, activation=activation, **given).squeeze(0)


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
    given = {"scale": scale, "shift": shift, "residual": residual}
    return _public("conv2d", input, weight, bias, (stride, padding, dilation, groups, padding_mode), given, activation)


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
    given = {"scale": scale, "shift": shift, "residual": residual}
    return _public(
        "conv2d_max_pool2d", input, weight, bias, (stride, padding, dilation, groups, padding_mode), given, activation
    )


__all__ = ["conv1d", "conv2d", "conv2d_max_pool2d", "conv_transpose2d", "run"]
