"""Max pooling: schema, checks, gradient, and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _pooling
from pyvision_kernels._check import require
from pyvision_kernels._op import declare
from pyvision_kernels._pooling import Numbers

_TORCH: Any = F  # whose types want to know at once whether indices are asked for


def _fake(input, window, rows, columns, with_places):
    _pooling.check_map("max_pool2d", input)
    last = _pooling.is_channels_last(input)
    size = (*input.shape[:2], rows, columns)
    output = _pooling.empty(input, size, last)
    places = _pooling.empty(input, size, last, torch.int32) if with_places else input.new_empty(0, dtype=torch.int32)
    return output, places


def _setup(ctx, inputs, output):
    input, ctx.window, rows, columns, with_places = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.outputs = rows, columns
    ctx.size = input.shape[2:]
    ctx.channels_last = _pooling.is_channels_last(input)
    ctx.save_for_backward(output[1] if with_places else None, None if with_places else input)


def _backward(ctx, grad, _):
    places, input = ctx.saved_tensors
    if places is None:  # no gradient was in sight
        places = max_pool2d_op(input, ctx.window, *ctx.outputs, True)[1]
    return max_pool2d_backward_op(grad, places, ctx.window, *ctx.size, ctx.channels_last), *(None,) * 4


def _vmap(info, in_dims, *args):
    return _pooling.batched(max_pool2d_op, info, in_dims, *args)


max_pool2d_op = declare(
    "max_pool2d(Tensor input, int[] window, SymInt rows, SymInt columns, bool with_places) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=lambda *args: args,
    vmap=_vmap,
)


def _fake_backward(grad, places, window, height, width, channels_last):
    op = "_max_pool2d_backward"
    require(grad.dim() == 4, op, "grad to have 4 dimensions [N, C, OH, OW]", grad.shape)
    require(places.shape == grad.shape, op, f"places to have the size of grad, {list(grad.shape)}", places.shape)
    require(places.dtype == torch.int32, op, "places to be int32", places.dtype)
    _pooling.check_pixels(op, height, width)
    return _pooling.empty(grad, (*grad.shape[:2], height, width), channels_last)


def _setup_double(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward_double(ctx, grad):
    # The backward is linear in its gradient, and adds each element at one place: its own backward reads there.
    (places,) = ctx.saved_tensors
    return _read(grad, places), *(None,) * 5


def _vmap_backward(info, in_dims, *args):
    return _pooling.batched(max_pool2d_backward_op, info, in_dims, *args)


max_pool2d_backward_op = declare(
    "_max_pool2d_backward(Tensor grad, Tensor places, int[] window, SymInt height, SymInt width, bool channels_last) "
    "-> Tensor",
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_backward_double,
    autocast=lambda *args: args,
    vmap=_vmap_backward,
)


def _read(map: Tensor, places: Tensor) -> Tensor:
    """The elements of a map at places; zeros where they are outside of it."""
    pixels = map.shape[2] * map.shape[3]
    at = places.flatten(2).long()
    inside = (at >= 0) & (at < pixels)
    read = map.flatten(2).gather(2, torch.where(inside, at, 0)) if pixels else map.new_zeros(at.shape)
    return torch.where(inside, read, 0).reshape(places.shape)


def _fake_unpool(input, indices, height, width):
    op = "max_unpool2d"
    _pooling.check_map(op, input)
    _check_indices(input, indices)
    _pooling.check_pixels(op, height, width)
    return _pooling.empty(input, (*input.shape[:2], height, width), _pooling.is_channels_last(input))


def _setup_unpool(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward_unpool(ctx, grad):
    (indices,) = ctx.saved_tensors
    if grad.device.type != "cpu":
        return _read(grad, indices), None, None, None
    # There the forward has refused indices outside of the map.
    return grad.flatten(2).gather(2, indices.flatten(2)).reshape(indices.shape), None, None, None


def _cast_unpool(input, *rest):
    # As torch: in float32, on the CPU.
    half = input.dtype in (torch.float16, torch.bfloat16)
    return input.float() if half and input.device.type == "cpu" else input, *rest


def _vmap_unpool(info, in_dims, *args):
    return _pooling.batched(max_unpool2d_op, info, in_dims, *args)


max_unpool2d_op = declare(
    "max_unpool2d(Tensor input, Tensor indices, SymInt height, SymInt width) -> Tensor",
    fake=_fake_unpool,
    setup_context=_setup_unpool,
    backward=_backward_unpool,
    autocast=_cast_unpool,
    vmap=_vmap_unpool,
)


def _pool(op: str, input: Tensor, window: list[int], size: list[Any], return_indices: bool) -> Any:
    """Of [N, C, H, W] or [C, H, W]."""
    _pooling.check_pixels(op, *input.shape[-2:])
    maps = input if input.dim() == 4 else input.unsqueeze(0)
    values, places = max_pool2d_op(maps, window, *size, return_indices or _pooling.may_get_gradient(input))
    if maps is not input:
        values = values.squeeze(0)
        places = places.squeeze(0) if return_indices else places
    return (values, places.long()) if return_indices else values


def max_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of a map.

    Matches `torch.nn.functional.max_pool2d`: NaN is the maximum of a window that has one; of equal values the first
    gets the gradient, of several NaN the last. A window without a pixel, which a dilation may leave, gives minus
    infinity, the index -1 and no gradient.

    Args:
        input (Tensor[N, C, H, W] or [C, H, W]): float16, bfloat16, float32 or float64; any strides.
        kernel_size (int or pair): Rows and columns of a window.
        stride (int or pair): From window to window. Default: ``kernel_size``.
        padding (int or pair): Rows above and below, columns left and right that never win; at most half of
            ``kernel_size``. Default: 0.
        dilation (int or pair): From pixel to pixel of a window. Default: 1.
        ceil_mode (bool): A last window may end outside of the padded map; it begins inside, or in the padding before.
        return_indices (bool): The places y * W + x of the maxima too.

    Returns:
        Tensor[N, C, OH, OW] in input's dtype and layout; with ``return_indices`` a pair of it and an int64 Tensor.

    Raises:
        RuntimeError: no window fits, a number is out of range, a dimension but the batch is empty.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor or not made of ints.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.max_pool2d.
    """
    op = "max_pool2d"
    _pooling.check_input(op, input)
    window = _pooling.window_of(op, kernel_size, stride, padding, dilation)
    size = _pooling.output_size(op, window, input.shape[-2:], ceil_mode)
    if _pooling.is_for_torch(input, of_maxima=True, dilated=window[6:] != [1, 1]):
        return _TORCH.max_pool2d(input, window[:2], window[2:4], window[4:6], window[6:], ceil_mode, return_indices)
    return _pool(op, input, window, size, return_indices)


def max_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of a row: `max_pool2d` of a map with one row.

    Matches `torch.nn.functional.max_pool1d`.

    Args:
        input (Tensor[N, C, L] or [C, L]): float16, bfloat16, float32 or float64; any strides.
        kernel_size, stride, padding, dilation (int): As of `max_pool2d`.
        ceil_mode, return_indices (bool): As of `max_pool2d`.

    Returns:
        Tensor[N, C, OL] of input's dtype; with ``return_indices`` a pair of it and an int64 Tensor.

    Raises:
        As `max_pool2d`.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.max_pool1d.
    """
    op = "max_pool1d"
    _pooling.check_input(op, input, 3)
    window = _pooling.window_of(op, kernel_size, stride, padding, dilation, 1)
    size = _pooling.output_size(op, window, (1, input.shape[-1]), ceil_mode)
    if _pooling.is_for_torch(input, of_maxima=True, dilated=window[6:] != [1, 1]):
        return _TORCH.max_pool1d(input, *(number for number in window[1::2]), ceil_mode, return_indices)
    result = _pool(op, input.unsqueeze(-2), window, size, return_indices)
    return (result[0].squeeze(-2), result[1].squeeze(-2)) if return_indices else result.squeeze(-2)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The maximum of each of OH x OW windows that cover a map.

    Matches `torch.nn.functional.adaptive_max_pool2d`: output o of an axis reads the pixels from
    ``floor(o * size / outputs)`` up to ``ceil((o + 1) * size / outputs)``.

    Args:
        input (Tensor[N, C, H, W] or [C, H, W]): float16, bfloat16, float32 or float64; any strides.
        output_size (int, None or pair): Rows and columns of the result; None: those of the input.
        return_indices (bool): As of `max_pool2d`.

    Returns:
        Tensor[N, C, OH, OW] in input's dtype and layout; with ``return_indices`` a pair of it and an int64 Tensor.

    Raises:
        RuntimeError: a dimension but the batch is empty.
        ValueError: ``output_size`` is negative.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor or not made of ints.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.adaptive_max_pool2d.
    """
    op = "adaptive_max_pool2d"
    _pooling.check_input(op, input)
    size = _pooling.adaptive_size(op, output_size, input.shape[-2:])
    if _pooling.is_for_torch(input, of_maxima=True, one_pixel=list(size) == [1, 1], adaptive=True):
        return _TORCH.adaptive_max_pool2d(input, size, return_indices)
    return _pool(op, input, [], size, return_indices)


def _check_indices(input: Tensor, indices: Tensor) -> None:
    op = "max_unpool2d"
    require(indices.shape == input.shape, op, f"indices to have the size of input, {list(input.shape)}", indices.shape)
    require(indices.dtype == torch.int64, op, "indices to be int64", indices.dtype)
    require(indices.device == input.device, op, f"indices to be on {input.device} as input is", indices.device)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    output_size: Any = None,
) -> Tensor:
    """The partial inverse of `max_pool2d`: each maximum goes to its place, the rest is zeros.

    Matches `torch.nn.functional.max_unpool2d`. Of elements with the same index the last, row by row, is written.

    Args:
        input (Tensor[N, C, H, W] or [C, H, W]): float16, bfloat16, float32 or float64; any strides.
        indices (Tensor, int64): Places y * OW + x in the result; of input's size.
        kernel_size, stride, padding (int or pair): Of the `max_pool2d` that is undone.
        output_size (sequence of int): Of the result, or its last two dimensions; less than a stride from the default,
            (H - 1) * stride - 2 * padding + kernel_size.

    Returns:
        Tensor[N, C, OH, OW] in input's dtype and layout.

    Raises:
        RuntimeError: an index is outside of the result; on CUDA, where that is not seen, its element is left out. A
            size or dtype does not fit.
        ValueError: ``output_size`` is too far from the default.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor or not made of ints.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.max_unpool2d.
    """
    op = "max_unpool2d"
    _pooling.check_input(op, input)
    _pooling.require_tensors(op, indices=indices)
    _check_indices(input, indices)
    kernel = _pooling.numbers_of(op, "kernel_size", kernel_size, 1)
    step = kernel if stride is None or stride == [] else _pooling.numbers_of(op, "stride", stride, 1)
    around = _pooling.numbers_of(op, "padding", padding, 0)
    axes = zip(input.shape[-2:], kernel, step, around, strict=True)
    size = [(length - 1) * s - 2 * p + k for length, k, s, p in axes]
    if output_size is not None:
        wanted = list(output_size)[-2:] if len(output_size) == input.dim() else list(output_size)
        if len(wanted) != 2:
            raise ValueError(f"{op}: expected output_size to have 2 or {input.dim()} numbers, but got {output_size}")
        for length, default, s in zip(wanted, size, step, strict=True):
            if not default - s < length < default + s:
                raise ValueError(
                    f"{op}: expected output_size to be less than a stride {list(step)} from {size}, but got {wanted}"
                )
        size = wanted
    require(min(size) > 0, op, "an output with at least one pixel", size)
    _pooling.check_pixels(op, *size)
    if _pooling.is_unpooled_by_torch(input):
        return _TORCH.max_unpool2d(input, indices, kernel, step, around, size)
    if input.dim() == 3:
        return max_unpool2d_op(input.unsqueeze(0), indices.unsqueeze(0), *size).squeeze(0)
    return max_unpool2d_op(input, indices, *size)
