"""The two gradients of a convolution as operators of their own, with CUDA kernels: of its input, of its weight.

Both are of zero padding. The gradient of the input is the transposed convolution, and serves `conv_transpose2d` too,
whence its bias and activation. Each one's own gradients are made of conv2d and of the two again. `algorithm` is DIRECT
or TF32 of algorithm.py: which kernel runs is for the backend to say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._check import FLOATING, require
from pyvision_kernels._op import Op, declare
from pyvision_kernels.ops.conv2d.geometry import Geometry

INPUT, WEIGHT = "_conv2d_backward_input", "_conv2d_backward_weight"


def _check(op: str, grad: Tensor, other: Tensor, name: str, numbers: list[int], size: Any, taps: Any, outputs: Any):
    """What the sizes of the convolution say of grad_output."""
    require(other.dim() == 4, op, f"{name} to have 4 dimensions", other.shape)
    if other.dtype not in FLOATING:
        raise RuntimeError(f"{op}: expected {name} to be float16, bfloat16, float32 or float64, but got {other.dtype}")
    require(grad.dtype == other.dtype, op, f"grad_output to be {other.dtype} as {name} is", grad.dtype)
    require(grad.device == other.device, op, f"grad_output to be on the device of {name}", grad.device)
    rows, columns = Geometry(numbers).output_size(size, taps)
    wanted = [grad.shape[0], outputs, rows, columns]
    require(list(grad.shape) == wanted, op, f"grad_output to have size {wanted}", grad.shape)


def is_channels_last(tensor: Tensor) -> bool:
    """And not contiguous as well, as a map of one channel or one pixel is."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _empty(like: Tensor, size: tuple[Any, ...], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _unbound(op: Any, tensors: int) -> Any:
    """A vmap rule: the op of each element of the batch."""

    def batch(info, in_dims, *args):
        each = [
            arg.unbind(dim) if arg is not None and dim is not None else (arg,) * info.batch_size
            for arg, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        return torch.stack([op()(*one, *args[tensors:]) for one in zip(*each, strict=True)]), 0

    return batch


def _cast(*args):
    # As torch's convolutions: all in autocast's dtype, but float64.
    dtype = torch.get_autocast_dtype(args[0].device.type)
    return tuple(arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype in FLOATING[:3] else arg for arg in args)


# ---- with respect to the input ----


def _fake_input(grad_output, weight, bias, numbers, size, activation, channels_last, algorithm):
    _check(INPUT, grad_output, weight, "weight", numbers, size, weight.shape[2:], weight.shape[0])
    channels = weight.shape[1] * numbers[8]
    if bias is not None:
        require(tuple(bias.shape) == (channels,), INPUT, f"bias to have size [{channels}]", bias.shape)
    return _empty(weight, (grad_output.shape[0], channels, *size), channels_last)


def _setup_input(ctx, inputs, output):
    grad_output, weight, bias, *ctx.options = inputs
    activation = ctx.options[2]
    by_result = activation != 0 and not _activation.needs_input(activation)
    ctx.save_for_backward(grad_output, weight, bias, output if by_result else None)


def _convolve(input, weight, numbers, channels_last, kernel):
    from pyvision_kernels.ops.conv2d.operator import conv2d_op  # which declares its own gradient by this module

    return conv2d_op(input, weight, *(None,) * 5, numbers, 0, False, channels_last, kernel)


def gradient_of_input(ctx: Any, grad: Tensor, convolve: Any, to_input: Any, to_weight: Any) -> tuple[Any, ...]:
    """Gradients of grad_output, weight and bias, by the operators given."""
    grad_output, weight, bias, at = ctx.saved_tensors
    numbers, size, activation, channels_last, kernel = ctx.options[:5]
    if _activation.needs_input(activation):
        # In float32 beside 16 bits: a derivative that jumps is taken on the right side.
        wide = [
            value.float() if value is not None and value.dtype != torch.float64 else value
            for value in (grad_output, weight, bias)
        ]
        at = to_input(*wide, numbers, size, 0, channels_last, kernel)
    grad = _activation.backward(activation, grad, at).to(weight.dtype) if activation else grad
    needs = ctx.needs_input_grad
    by_grad = convolve(grad, weight, numbers, channels_last, kernel) if needs[0] else None
    by_weight = None
    if needs[1]:
        by_weight = to_weight(grad_output, grad, numbers, list(weight.shape[2:]), is_channels_last(weight), kernel)
    by_bias = grad.sum((0, 2, 3)).to(bias.dtype) if needs[2] and bias is not None else None
    return by_grad, by_weight, by_bias


def _backward_of_input(ctx, grad):
    return *gradient_of_input(ctx, grad, _convolve, backward_input_op, backward_weight_op), *(None,) * 5


backward_input_op: Op = declare(
    f"{INPUT}(Tensor grad_output, Tensor weight, Tensor? bias, int[] geometry, SymInt[] size, int activation, "
    "bool channels_last, int algorithm) -> Tensor",
    fake=_fake_input,
    setup_context=_setup_input,
    backward=_backward_of_input,
    autocast=_cast,
    vmap=_unbound(lambda: backward_input_op, 3),
    cuda_only=True,
)


# ---- with respect to the weight ----


def _fake_weight(grad_output, input, numbers, taps, channels_last, algorithm):
    require(input.dim() == 4, WEIGHT, "input to have 4 dimensions [N, C, H, W]", input.shape)
    _check(WEIGHT, grad_output, input, "input", numbers, input.shape[2:], taps, grad_output.shape[1])
    groups = numbers[8]
    channels = input.shape[1], grad_output.shape[1]
    require(
        not any(count % groups for count in channels), WEIGHT, f"channels in multiples of groups {groups}", channels
    )
    return _empty(input, (grad_output.shape[1], input.shape[1] // groups, *taps), channels_last)


def _setup_weight(ctx, inputs, output):
    grad_output, input, *ctx.options = inputs
    ctx.save_for_backward(grad_output, input)


def gradient_of_weight(ctx: Any, grad: Tensor, convolve: Any, to_input: Any) -> tuple[Any, ...]:
    """Gradients of grad_output and input, by the operators given."""
    grad_output, input = ctx.saved_tensors
    numbers, _, _, kernel = ctx.options[:4]
    needs = ctx.needs_input_grad
    by_grad = by_input = None
    if needs[0]:
        by_grad = convolve(input, grad, numbers, is_channels_last(grad_output), kernel)
    if needs[1]:
        by_input = to_input(grad_output, grad, None, numbers, list(input.shape[2:]), 0, is_channels_last(input), kernel)
    return by_grad, by_input


def _backward_of_weight(ctx, grad):
    return *gradient_of_weight(ctx, grad, _convolve, backward_input_op), *(None,) * 4


backward_weight_op: Op = declare(
    f"{WEIGHT}(Tensor grad_output, Tensor input, int[] geometry, int[] taps, bool channels_last, int algorithm) "
    "-> Tensor",
    fake=_fake_weight,
    setup_context=_setup_weight,
    backward=_backward_of_weight,
    autocast=_cast,
    vmap=_unbound(lambda: backward_weight_op, 2),
    cuda_only=True,
)
