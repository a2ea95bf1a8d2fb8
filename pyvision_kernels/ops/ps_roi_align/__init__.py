"""Position-sensitive RoI align and pool: schemas, checks, gradients, and the public functions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyvision_kernels._check import as_pair, autocasts, require, require_tensors
from pyvision_kernels._op import Op, declare
from pyvision_kernels._rois import (
    batch_backward,
    batch_forward,
    cast_boxes,
    check_map,
    check_sampling,
    empty,
    is_channels_last,
    join_boxes,
)


def _check_all(
    op: str, map: Tensor, boxes: Tensor, channels: int, pooled: Sequence[int], sampling: Sequence[int]
) -> None:
    """`map`: the input, or the gradient of the output. `sampling`: what ps_roi_align has, and ps_roi_pool has not."""
    check_map(op, map, boxes)
    height, width = pooled
    if channels % (height * width) != 0:
        require(False, op, f"input to have channels in a multiple of {height} * {width}", channels)
    for ratio in sampling:
        check_sampling(op, ratio)


def _cast(input, boxes, *rest):
    return input, cast_boxes(input, boxes), *rest


def _declare(name: str, sampling_schema: str) -> tuple[Op, Op]:
    """The op and its backward."""
    grad_name = f"_{name}_backward"

    def fake(input, boxes, spatial_scale, pooled_height, pooled_width, *sampling):
        _check_all(name, input, boxes, input.size(1), (pooled_height, pooled_width), sampling)
        channels = input.size(1) // (pooled_height * pooled_width)
        return empty(input, (boxes.size(0), channels, pooled_height, pooled_width), is_channels_last(input))

    def fake_backward(grad, boxes, spatial_scale, pooled_height, pooled_width, *rest):
        *sampling, batch_size, channels, height, width, channels_last = rest
        _check_all(grad_name, grad, boxes, channels, (pooled_height, pooled_width), sampling)
        return empty(grad, (batch_size, channels, height, width), channels_last)

    def setup(ctx, inputs, output):
        input, boxes, *ctx.geometry = inputs
        ctx.save_for_backward(boxes)
        ctx.input_size = input.shape
        ctx.channels_last = is_channels_last(input)

    def backward(ctx, grad):
        (boxes,) = ctx.saved_tensors
        grad_input = backward_op(grad, boxes, *ctx.geometry, *ctx.input_size, ctx.channels_last)
        return grad_input, None, *(None for _ in ctx.geometry)

    def setup_double(ctx, inputs, output):
        _, boxes, *ctx.geometry = inputs[:-5]
        ctx.save_for_backward(boxes)

    def backward_double(ctx, grad):
        # The backward is linear in its gradient, and its own backward is the forward.
        (boxes,) = ctx.saved_tensors
        return op(grad, boxes, *ctx.geometry), None, *(None for _ in ctx.geometry), *(None,) * 5

    def vmap(info, in_dims, input, boxes, *geometry):
        def pool(inputs, boxes):
            return op(*inputs, boxes, *geometry)

        bins = geometry[1] * geometry[2]
        return batch_forward(info.batch_size, in_dims[:1], in_dims[1], [input], boxes, pool, bins)

    def vmap_backward(info, in_dims, grad, boxes, *rest):
        *geometry, batch_size, channels, height, width, channels_last = rest

        def gradient(grad, boxes, images, channels):
            return [backward_op(grad, boxes, *geometry, images, channels, height, width, channels_last)]

        grads, dims = batch_backward(
            info.batch_size, in_dims[0], in_dims[1], grad, boxes, batch_size, channels, gradient
        )
        return grads[0], dims[0]

    geometry = f"Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width{sampling_schema}"
    sizes = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
    backward_op = declare(
        f"{grad_name}(Tensor grad, {geometry}, {sizes}, bool channels_last) -> Tensor",
        fake=fake_backward,
        setup_context=setup_double,
        backward=backward_double,
        autocast=_cast,
        vmap=vmap_backward,
    )
    op = declare(
        f"{name}(Tensor input, {geometry}) -> Tensor",
        fake=fake,
        setup_context=setup,
        backward=backward,
        autocast=_cast,
        vmap=vmap,
    )
    return op, backward_op


ps_roi_align_op, ps_roi_align_backward_op = _declare("ps_roi_align", ", int sampling_ratio")
ps_roi_pool_op, ps_roi_pool_backward_op = _declare("ps_roi_pool", "")


def _normalize(
    op: str,
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    sampling: Sequence[int] = (),
) -> tuple[Tensor, int, int]:
    """Boxes [K, 5], and PH and PW, checked."""
    pooled = as_pair(op, "output_size", output_size)
    require_tensors(op, input=input)
    require(input.dim() == 4, op, "input to have 4 dimensions [N, C, H, W]", input.shape)
    boxes = join_boxes(op, boxes, input)
    _check_all(op, input, cast_boxes(input, boxes) if autocasts(input) else boxes, input.size(1), pooled, sampling)
    return boxes, *pooled


def ps_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """Pools each box into a grid of bins by averaging bilinear samples, each bin from channels of its own.

    Bin (ph, pw) of output channel c reads input channel ``(c * PH + ph) * PW + pw``. Matches
    `torchvision.ops.ps_roi_align`, with bfloat16, threads and a deterministic backward. A box with a coordinate that is
    not finite, with a batch index out of range, or without samples gives zeros and no gradient.

    Args:
        input (Tensor[N, C * PH * PW, H, W]): Feature maps; float16, bfloat16, float32 or float64; any strides.
        boxes (Tensor[K, 5] or list of N Tensor[K_i, 4]): (batch index, x1, y1, x2, y2), or (x1, y1, x2, y2) for each
            image, in pixels of the original image; dtype of ``input``, or float32 beside a 16-bit ``input``; not
            differentiable.
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel. Default: 1.0.
        sampling_ratio (int): Samples per bin and axis, at most 4096; <= 0: adaptive, ``ceil(box size / bins)``.
            Default: -1.

    Returns:
        Tensor[K, C, PH, PW], dtype and device of ``input``; channels_last where ``input`` is.

    Raises:
        RuntimeError: a shape, device or dtype does not fit, or the channels are not a multiple of PH * PW.
        NotImplementedError: ``input`` is of another dtype.
        ValueError: ``output_size`` is not positive.
        TypeError: ``boxes`` is neither a Tensor nor a list of them.

    Note: deterministic forward and backward.
    Reference: Li et al., Light-Head R-CNN, 2017, section 3.2; Dai et al., R-FCN, 2016, section 2.
    """
    boxes, pooled_height, pooled_width = _normalize("ps_roi_align", input, boxes, output_size, (sampling_ratio,))
    return ps_roi_align_op(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio)


def ps_roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """Pools each box into a grid of bins by averaging whole pixels, each bin from channels of its own.

    Bin (ph, pw) of output channel c reads input channel ``(c * PH + ph) * PW + pw``. Matches
    `torchvision.ops.ps_roi_pool`, with bfloat16, threads and a deterministic backward; as there, the last row and
    column of a map are never read. The gradient is that of this function; torchvision's differs for boxes that reach
    the last row or column. A box with a coordinate that is not finite, or a batch index out of range, gives zeros and
    no gradient.

    Args:
        input (Tensor[N, C * PH * PW, H, W]): Feature maps; float16, bfloat16, float32 or float64; any strides.
        boxes (Tensor[K, 5] or list of N Tensor[K_i, 4]): (batch index, x1, y1, x2, y2), or (x1, y1, x2, y2) for each
            image, in pixels of the original image; dtype of ``input``, or float32 beside a 16-bit ``input``; not
            differentiable.
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel. Default: 1.0.

    Returns:
        Tensor[K, C, PH, PW], dtype and device of ``input``; channels_last where ``input`` is.

    Raises:
        RuntimeError: a shape, device or dtype does not fit, or the channels are not a multiple of PH * PW.
        NotImplementedError: ``input`` is of another dtype.
        ValueError: ``output_size`` is not positive.
        TypeError: ``boxes`` is neither a Tensor nor a list of them.

    Note: deterministic forward and backward.
    Reference: Dai et al., R-FCN, 2016, section 2.
    """
    boxes, pooled_height, pooled_width = _normalize("ps_roi_pool", input, boxes, output_size)
    return ps_roi_pool_op(input, boxes, spatial_scale, pooled_height, pooled_width)
