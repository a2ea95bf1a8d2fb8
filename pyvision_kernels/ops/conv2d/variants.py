"""conv1d and conv_transpose2d, through conv2d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation, _backend
from pyvision_kernels._check import autocasts, require, require_tensors
from pyvision_kernels._op import runs_cuda_kernels
from pyvision_kernels.ops.conv2d import algorithm, choice
from pyvision_kernels.ops.conv2d.geometry import Geometry, Padding, as_pair
from pyvision_kernels.ops.conv2d.operator import flows_channels_last, run


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    padding_mode: str = "zeros",
) -> Tensor:
    """Convolution along one dimension: that of a map with one row.

    Matches `torch.nn.functional.conv1d`.

    Args:
        input (Tensor[N, C, L] or [C, L]): As of `conv2d`.
        weight (Tensor[K, C / groups, S]), bias (Tensor[K]), groups, activation, padding_mode: As of `conv2d`.
        stride, dilation (int): Default: 1.
        padding (int, pair or str): Elements before and after; a pair (before, after), ``"valid"`` or ``"same"``.

    Returns:
        Tensor[N, K, OL] of input's dtype.

    Raises:
        As `conv2d`.

    Note: deterministic; as of `conv2d`.
    Reference: torch.nn.functional.conv1d.
    """
    op = "conv1d"
    require_tensors(op, input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    _activation.number_of(op, activation)
    require(weight.dim() == 3, op, "weight to have 3 dimensions [K, C / groups, S]", weight.shape)
    require(input.dim() in (2, 3), op, "input to have 3 dimensions [N, C, L], or 2 without N", input.shape)
    geometry = Geometry.of_row(stride, padding, dilation, groups, padding_mode, weight.shape[2], op)
    return run_row(input, weight, bias, geometry, activation=activation)


def run_row(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, **options: Any) -> Tensor:
    """`run` for [N, C, L] or [C, L] and [K, C / groups, S]."""
    rows = (input if input.dim() == 3 else input.unsqueeze(0)).unsqueeze(2)
    out = run(rows, weight.unsqueeze(2), bias, geometry, channels_last=False, **options).squeeze(2)
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
    """Transposed convolution: the gradient of conv2d with respect to its input.

    Matches `torch.nn.functional.conv_transpose2d`. On the CPU our kernel convolves the input, its pixels spread by the
    stride, with the flipped weight; with ``pvk.backend("auto")`` a stride above 1 goes to PyTorch, which skips the
    zeros. On CUDA it is the kernel of the gradient.

    Args:
        input (Tensor[N, C, H, W] or [C, H, W]): As of `conv2d`.
        weight (Tensor[C, K / groups, R, S]): Of input's dtype.
        bias (Tensor[K]): Of input's dtype.
        stride, padding, dilation (int or pair): Of the convolution that this is the gradient of.
        output_padding (int or pair): Rows below and columns to the right that the size of the input leaves open; below
            stride or dilation. Default: 0.
        groups (int): Default: 1.
        activation (str): As of `conv2d`.

    Returns:
        Tensor[N, K, OH, OW], OH = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1.

    Raises:
        As `conv2d`.

    Note: deterministic; the gradient is by PyTorch's operators.
    Reference: Dumoulin and Visin, A guide to convolution arithmetic for deep learning, 2016.
    """
    op = "conv_transpose2d"
    require_tensors(op, input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    _activation.number_of(op, activation)
    require(weight.dim() == 4, op, "weight to have 4 dimensions [C, K / groups, R, S]", weight.shape)
    require(input.dim() in (3, 4), op, "input to have 4 dimensions [N, C, H, W], or 3 without N", input.shape)
    stride, dilation = as_pair(op, "stride", stride, 1), as_pair(op, "dilation", dilation, 1)
    padding, extra = as_pair(op, "padding", padding, 0), as_pair(op, "output_padding", output_padding, 0)
    geometry = Geometry.of(1, 0, dilation, groups, "zeros", weight.shape[2:], op)
    if input.dim() == 3:
        return conv_transpose2d(
            input.unsqueeze(0), weight, bias, stride, padding, extra, groups, dilation, activation=activation
        ).squeeze(0)
    require(
        input.shape[1] == weight.shape[0] and weight.shape[0] % groups == 0,
        op,
        "input to have the channels of weight, {}, in a multiple of groups {}",
        input.shape,
        weight.shape[0],
        groups,
    )
    require(input.dtype == weight.dtype, op, f"weight to be {input.dtype} as input is", weight.dtype)
    require(weight.shape[2] > 0 and weight.shape[3] > 0, op, "weight to have at least one tap", weight.shape)
    for more, step, spread in zip(extra, stride, dilation, strict=True):
        require(more < max(step, spread), op, "output_padding to be below stride or dilation", extra)
    options = stride, padding, extra, groups, dilation, activation
    mode = _backend.CHOICE.backend
    if autocasts(input) or mode == "torch" or (mode == "auto" and stride != (1, 1) and not runs_cuda_kernels(input)):
        return _by_torch(input, weight, bias, *options)
    if runs_cuda_kernels(input):
        return _by_gradient(input, weight, bias, *options)
    # What the reach of the weight leaves at each end, a negative number where it is cut off.
    reach = [spread * (taps - 1) for spread, taps in zip(dilation, weight.shape[2:], strict=True)]
    before = [whole - cut for whole, cut in zip(reach, padding, strict=True)]
    ends = [(first, first + more) for first, more in zip(before, extra, strict=True)]
    spread_map = F.pad(_spread(input, stride), (*ends[1], *ends[0]))
    require(
        all(size > whole for size, whole in zip(spread_map.shape[2:], reach, strict=True)),
        op,
        "an output with at least one pixel",
        [size - whole for size, whole in zip(spread_map.shape[2:], reach, strict=True)],
    )
    return run(spread_map, _flipped(weight, groups), bias, geometry, activation=activation)


def _by_torch(input, weight, bias, stride, padding, extra, groups, dilation, activation) -> Tensor:
    out = F.conv_transpose2d(input, weight, bias, stride, padding, extra, groups, dilation)
    return _activation.apply(_activation.NUMBERS[activation], out)


def _by_gradient(input, weight, bias, stride, padding, extra, groups, dilation, activation) -> Tensor:
    """By a kernel of the gradient of the convolution that this one is the transpose of."""
    given = input, weight, bias, stride, padding, extra, groups, dilation, activation
    size = [
        (length - 1) * step - 2 * cut + spread * (taps - 1) + more + 1
        for length, step, cut, spread, taps, more in zip(
            input.shape[2:], stride, padding, dilation, weight.shape[2:], extra, strict=True
        )
    ]
    require(min(size) > 0, "conv_transpose2d", "an output with at least one pixel", size)
    beyond = [more // step for more, step in zip(extra, stride, strict=True)]
    if any(beyond):  # beside a dilation: pixels that none of the input's reach
        input = F.pad(input, (0, beyond[1], 0, beyond[0]))
    rows, columns = padding
    numbers = [*stride, columns, columns, rows, rows, *dilation, groups, 0]
    number, last = _activation.NUMBERS[activation], flows_channels_last(input, weight)

    def by_kernel(kernel: int) -> Tensor:
        if kernel == algorithm.TORCH:
            return _by_torch(*given)
        return choice.backward_input(input, weight, bias, numbers, size, number, last, kernel=kernel)

    kernel = choice.choose_gradient(
        choice.INPUT,
        (input.shape[0], weight.shape[1] * groups, *size),
        weight.shape,
        input,
        numbers,
        last,
        choice.precision_of(input.dtype, input.device.type),
        _backend.CHOICE.backend,
        by_kernel,
        choice.fusion_of(bias, None, None, None, activation, pool=False),
    )
    return by_kernel(kernel)


def _spread(input: Tensor, stride: tuple[int, int]) -> Tensor:
    """The pixels with stride - 1 zeros between them."""
    if stride == (1, 1):
        return input
    images, channels, height, width = input.shape
    rows, columns = stride
    wide = F.pad(input[:, :, :, None, :, None], (0, columns - 1, 0, 0, 0, rows - 1))
    wide = wide.reshape(images, channels, height * rows, width * columns)
    return wide[:, :, : max(height * rows - rows + 1, 0), : max(width * columns - columns + 1, 0)]


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """[C, K / groups, R, S] as the weight [K, C / groups, R, S] of the convolution."""
    channels, outputs, *taps = weight.shape
    grouped = weight.flip(2, 3).view(groups, channels // groups, outputs, *taps)
    return grouped.transpose(1, 2).reshape(groups * outputs, channels // groups, *taps)
