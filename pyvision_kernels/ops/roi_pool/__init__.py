"""RoI max pooling: schema, checks, gradient, and the public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvision_kernels._check import as_pair, autocasts, require, require_tensors
from pyvision_kernels._op import declare
from pyvision_kernels.ops.roi_align import _cast, _check, _empty, _is_channels_last, _join_boxes, _split_boxes


def _check_pixels(height: int, width: int, op: str = "roi_pool") -> None:
    if height * width >= 2**31:
        require(False, op, f"input to have fewer than {2**31} pixels a channel", f"{height} x {width}")


def _fake(input, boxes, spatial_scale, pooled_height, pooled_width):
    _check(input, boxes, "roi_pool")
    _check_pixels(*input.shape[2:])
    size = (boxes.size(0), input.size(1), pooled_height, pooled_width)
    output = _empty(input, size, _is_channels_last(input))
    return output, torch.empty_like(output, dtype=torch.int32)


def _fake_backward(
    grad, boxes, argmax, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width, last=False
):
    op = "_roi_pool_backward"
    _check(grad, boxes, op)
    _check_pixels(height, width, op)
    size = [boxes.size(0), channels, pooled_height, pooled_width]
    for name, tensor in (("grad", grad), ("argmax", argmax)):
        require(list(tensor.shape) == size, op, f"{name} to have size {size}", tensor.shape)
    require(argmax.dtype == torch.int32, op, "argmax to be int32", argmax.dtype)
    return _empty(grad, (batch_size, channels, height, width), last)


def _setup(ctx, inputs, output):
    input, boxes, ctx.spatial_scale, *ctx.pooled = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(boxes, output[1])
    ctx.input_size = input.shape
    ctx.channels_last = _is_channels_last(input)


def _backward(ctx, grad, _):
    boxes, argmax = ctx.saved_tensors
    grad_input = roi_pool_backward_op(
        grad, boxes, argmax, ctx.spatial_scale, *ctx.pooled, *ctx.input_size, ctx.channels_last
    )
    return grad_input, None, None, None, None


def _setup_double(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward_double(ctx, grad):
    # The backward is linear in its gradient, and adds each element at one place: its own backward reads there.
    boxes, argmax = ctx.saved_tensors
    images, channels, height, width = grad.shape
    if grad.numel() == 0:
        return grad.new_zeros(argmax.shape), *(None,) * 10
    image = boxes[:, 0].nan_to_num().clamp(0, images - 1).long().view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=grad.device).view(1, -1, 1, 1)
    place = (image * channels + channel) * (height * width) + argmax.clamp(min=0)
    grad_grad = torch.where(argmax >= 0, grad.flatten()[place], 0)
    return grad_grad, *(None,) * 10


def _vmap(info, in_dims, input, boxes, *rest):
    size = info.batch_size
    if in_dims[1] is None:  # the same boxes for all: fold the batch into the channels
        folded = input.movedim(in_dims[0], 1)
        outputs = roi_pool_op(folded.flatten(1, 2), boxes, *rest)
        return tuple(out.unflatten(1, (size, folded.size(2))) for out in outputs), (1, 1)
    boxes = boxes.movedim(in_dims[1], 0)
    if in_dims[0] is None:
        outputs = roi_pool_op(input, boxes.flatten(0, 1), *rest)
    else:
        input = input.movedim(in_dims[0], 0)
        outputs = roi_pool_op(input.flatten(0, 1), _split_boxes(boxes, size, input.size(1)), *rest)
    return tuple(out.unflatten(0, (size, boxes.size(1))) for out in outputs), (0, 0)


def _vmap_backward(info, in_dims, grad, boxes, argmax, scale, pooled_height, pooled_width, images, channels, *rest):
    size = info.batch_size
    rest = (scale, pooled_height, pooled_width), rest

    def moved(tensor: Tensor, dim: int | None, to: int) -> Tensor:
        return tensor.movedim(dim, to) if dim is not None else tensor.unsqueeze(to).expand(*_inserted(tensor, to, size))

    if in_dims[1] is None:
        grad, argmax = (moved(x, dim, 1).flatten(1, 2) for x, dim in ((grad, in_dims[0]), (argmax, in_dims[2])))
        out = roi_pool_backward_op(grad, boxes, argmax, *rest[0], images, size * channels, *rest[1])
        return out.unflatten(1, (size, channels)), 1
    boxes = boxes.movedim(in_dims[1], 0)
    grad, argmax = (moved(x, dim, 0).flatten(0, 1) for x, dim in ((grad, in_dims[0]), (argmax, in_dims[2])))
    out = roi_pool_backward_op(
        grad, _split_boxes(boxes, size, images), argmax, *rest[0], size * images, channels, *rest[1]
    )
    return out.unflatten(0, (size, images)), 0


def _inserted(tensor: Tensor, dim: int, size: int) -> list[int]:
    shape = list(tensor.shape)
    return [*shape[:dim], size, *shape[dim:]]


def _cast_backward(grad, boxes, *rest):
    return *_cast(grad, boxes), *rest


roi_pool_backward_op = declare(
    "_roi_pool_backward(Tensor grad, Tensor boxes, Tensor argmax, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width, "
    "bool channels_last=False) -> Tensor",
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_backward_double,
    autocast=_cast_backward,
    vmap=_vmap_backward,
)

roi_pool_op = declare(
    "roi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=_vmap,
)


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """Pools each box of a feature map into a grid of bins, by the maximum of the pixels in each bin.

    Matches `torchvision.ops.roi_pool`, with 16-bit types on the CPU, threads and a deterministic backward. A box with
    a coordinate that is not finite, or a batch index out of range, gives zeros and no gradient. NaN is never a
    maximum: a bin of nothing else gives the lowest float32 and no gradient.

    Args:
        input (Tensor[N, C, H, W]): Feature maps; float16, bfloat16, float32 or float64; any strides.
        boxes (Tensor[K, 5] or list of N Tensor[K_i, 4]): (batch index, x1, y1, x2, y2), or (x1, y1, x2, y2) for each
            image, in pixels of the original image; dtype of ``input``, or float32 beside a 16-bit ``input``; not
            differentiable.
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel. Default: 1.0.

    Returns:
        Tensor[K, C, PH, PW], dtype and device of ``input``; channels_last where ``input`` is.

    Raises:
        RuntimeError: a shape, device or dtype does not fit, or a channel has 2^31 pixels or more.
        NotImplementedError: ``input`` is of another dtype.
        ValueError: ``output_size`` is not positive.
        TypeError: ``boxes`` is neither a Tensor nor a list of them.

    Note: deterministic forward and backward.
    Reference: Girshick, Fast R-CNN, 2015, section 2.1.
    """
    pooled_height, pooled_width = as_pair("roi_pool", "output_size", output_size)
    require_tensors("roi_pool", input=input)
    require(input.dim() == 4, "roi_pool", "input to have 4 dimensions [N, C, H, W]", input.shape)
    boxes = _join_boxes(boxes, input)
    cast = _cast(input, boxes) if autocasts(input) else (input, boxes)
    _check(cast[0], cast[1], "roi_pool")
    _check_pixels(*input.shape[2:])
    return roi_pool_op(input, boxes, spatial_scale, pooled_height, pooled_width)[0]
