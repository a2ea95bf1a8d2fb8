"""The gradient of conv2d, in operators each of which is differentiable again: PyTorch's, on CUDA also ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels._op import Emulation
from pyvision_kernels.ops.conv2d import choice
from pyvision_kernels.ops.conv2d.algorithm import TF32, TORCH, in_cuda_cpp
from pyvision_kernels.ops.conv2d.backward import is_channels_last


def _source_rows(mode: int, size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Which row each row of the padded map is a copy of (csrc/ops/conv2d/conv2d.h: source_index)."""
    i = torch.arange(-before, size + after, device=device)
    if mode == 1:
        return size - 1 - (size - 1 - i.abs()).abs()
    return i.clamp(0, size - 1) if mode == 2 else i % size


def _pad(input: Tensor, sides: list[int], mode: int) -> Tensor:
    left, right, top, bottom = sides
    if mode == 0:
        return F.pad(input, sides)
    rows = _source_rows(mode, input.shape[2], top, bottom, input.device)
    return input.index_select(2, rows).index_select(3, _source_rows(mode, input.shape[3], left, right, input.device))


def _unpad(grad: Tensor, input: Tensor, sides: list[int], mode: int) -> Tensor:
    left, right, top, bottom = sides
    height, width = input.shape[2:]
    if mode == 0:
        return grad[:, :, top : top + height, left : left + width]
    rows = _source_rows(mode, height, top, bottom, grad.device)
    columns = _source_rows(mode, width, left, right, grad.device)
    grad = grad.new_zeros((*grad.shape[:2], height, grad.shape[3])).index_add(2, rows, grad)
    return grad.new_zeros((*grad.shape[:3], width)).index_add(3, columns, grad)


def _convolution_backward(grad, input, weight, numbers, needs) -> tuple[Any, ...]:
    left, right, top, bottom = numbers[2:6]
    if (left, top) != (right, bottom):
        raise NotImplementedError(f"expected the same padding on opposite sides, but got {numbers[2:6]}")
    return torch.ops.aten.convolution_backward(
        *(grad, input, weight, None, numbers[0:2], [top, left], numbers[6:8], False, [0, 0], numbers[8]),
        [*needs, False],
    )


def _by(kernel: int, direction: str, grad: Tensor, input: Tensor, weight: Tensor, numbers: list[int]) -> Tensor:
    """One gradient of a convolution with zero padding, by the kernel of a number."""
    if direction == choice.INPUT:
        if kernel == TORCH:
            return _convolution_backward(grad, input, weight, numbers, (True, False))[0]
        size = list(input.shape[2:])
        return choice.backward_input(grad, weight, None, numbers, size, 0, is_channels_last(input), kernel=kernel)
    if kernel == TORCH:
        return _convolution_backward(grad, input, weight, numbers, (False, True))[1]
    taps = list(weight.shape[2:])
    return choice.backward_weight(grad, input, numbers, taps, is_channels_last(weight), kernel=kernel)


def _gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    needs: tuple[bool, ...],
    numbers: list[int],
    how: tuple[int, str],
    ops: tuple[Any, Any] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Those of input and weight, of a convolution with zero padding; the arguments as of `backward`."""
    kernel, backend = how
    if ops is not None:
        by_input = by_weight = None
        if needs[0]:
            size = list(input.shape[2:])
            by_input = ops[0](grad, weight, None, numbers, size, 0, is_channels_last(input), kernel)
        if needs[1]:
            taps = list(weight.shape[2:])
            by_weight = ops[1](grad, input, numbers, taps, is_channels_last(weight), kernel)
        return by_input, by_weight
    tf32 = in_cuda_cpp(kernel) == TF32
    last = is_channels_last(input) or is_channels_last(weight)

    def choose(direction: str) -> int:
        def by_kernel(kernel: int) -> Tensor:
            return _by(kernel, direction, grad, input, weight, numbers)

        sizes = input.shape, weight.shape
        return choice.choose_gradient(direction, *sizes, grad, numbers, last, tf32, backend, by_kernel)

    directions = choice.INPUT, choice.WEIGHT
    kernels = [choose(direction) if need else None for direction, need in zip(directions, needs, strict=True)]
    if kernels == [TORCH, TORCH]:
        return _convolution_backward(grad, input, weight, numbers, (True, True))[:2]
    by_input, by_weight = (
        None if kernel is None else _by(kernel, direction, grad, input, weight, numbers)
        for direction, kernel in zip(directions, kernels, strict=True)
    )
    return by_input, by_weight


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).view(-1, 1, 1)


def backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: list[int],
    activation: int,
    pool: bool,
    result: Tensor | None,
    convolve: Any,
    how: tuple[int, str],
    ops: tuple[Any, Any] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias, scale, shift, residual.

    Args:
        grad: Of the result.
        needs: Which of the six are asked for.
        tensors: The six.
        numbers: Of the Geometry.
        result: Of the forward, where it was not pooled.
        convolve: (input, weight, bias) -> their convolution.
        how: The algorithm of the forward, and `pvk.backend` when it ran.
        ops: What computes the gradients of input and weight; None: whatever is chosen for each.
    """
    input, weight, bias, scale, shift, _ = tensors
    assert input is not None
    assert weight is not None
    stride, sides, dilation, groups, mode = numbers[0:2], numbers[2:6], numbers[6:8], numbers[8], numbers[9]
    convolved = before = grad  # the convolution with its bias; what the activation is applied to
    if needs[3] or pool or _activation.needs_input(activation):
        # In float32 beside 16 bits: a derivative that jumps is taken on the right side.
        wide = [value.float() if value is not None and value.dtype != torch.float64 else value for value in tensors]
        convolved = before = convolve(*wide[:3])
        if scale is not None:
            before = before * _per_channel(scale, before)
        if shift is not None:
            before = before + _per_channel(shift, before)
        if wide[5] is not None:
            before = before + wide[5]
    if pool:
        result = _activation.apply(activation, before)
        chosen = F.max_pool2d(result.detach(), 2, return_indices=True)[1]
        spread = grad.new_zeros((*grad.shape[:2], result.shape[2] * result.shape[3]))
        # Windows do not overlap, so no place is written twice.
        grad = spread.scatter(2, chosen.flatten(2), grad.flatten(2)).view(result.shape)
    if activation:
        at = before if result is None or _activation.needs_input(activation) else result
        grad = _activation.backward(activation, grad, at)
    grads: list[Tensor | None] = [None] * 6
    grads[5] = grad.to(input.dtype) if needs[5] and tensors[5] is not None else None
    if needs[4] and shift is not None:
        grads[4] = grad.sum((0, 2, 3)).to(shift.dtype)
    if needs[3] and scale is not None:
        grads[3] = (grad * convolved).sum((0, 2, 3)).to(scale.dtype)
    grad = grad.to(input.dtype)
    if not any(needs[:3]):
        return tuple(grads)
    if scale is not None:
        grad = grad * _per_channel(scale, grad)
    if needs[2] and bias is not None:
        grads[2] = grad.sum((0, 2, 3)).to(bias.dtype)
    if needs[0] or needs[1]:
        left, right, top, bottom = sides
        # PyTorch's gradients are of the same padding on opposite sides.
        ours = ops is not None or Emulation.active or (grad.is_cuda and how[1] == "pvk")
        within = mode == 0 and (ours or (left, top) == (right, bottom))
        source = input if within else _pad(input, sides, mode)
        of_source = [*stride, *(sides if within else [0, 0, 0, 0]), *dilation, groups, 0]
        by_source, by_weight = _gradients(grad, source, weight, needs[:2], of_source, how, ops)
        grads[0] = by_source if within or by_source is None else _unpad(by_source, input, numbers[2:6], mode)
        grads[1] = by_weight
    return tuple(grads)
