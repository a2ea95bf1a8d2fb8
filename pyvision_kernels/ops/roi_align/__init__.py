"""RoI align: schema, checks, gradient, and the public function. Its pyramid is in multiscale.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyvision_kernels._check import as_pair, autocasts, require, require_tensors
from pyvision_kernels._op import declare
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
from pyvision_kernels.ops.roi_align.multiscale import multiscale_roi_align

__all__ = ["multiscale_roi_align", "roi_align"]


def _fake(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    check_map("roi_align", input, boxes)
    check_sampling("roi_align", sampling_ratio)
    size = (boxes.size(0), input.size(1), pooled_height, pooled_width)
    return empty(input, size, is_channels_last(input))


def _fake_backward(grad, boxes, spatial_scale, batch_size, channels, height, width, sampling_ratio, aligned, last):
    check_map("_roi_align_backward", grad, boxes)
    check_sampling("_roi_align_backward", sampling_ratio)
    return empty(grad, (batch_size, channels, height, width), last)


def _setup(ctx, inputs, output):
    input, boxes, ctx.spatial_scale, _, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(boxes)
    ctx.input_size = input.shape
    ctx.channels_last = is_channels_last(input)


def _backward(ctx, grad):
    (boxes,) = ctx.saved_tensors
    grad_input = roi_align_backward_op(
        grad, boxes, ctx.spatial_scale, *ctx.input_size, ctx.sampling_ratio, ctx.aligned, ctx.channels_last
    )
    return grad_input, None, None, None, None, None, None


def _setup_double(ctx, inputs, output):
    grad, boxes, ctx.spatial_scale, _, _, _, _, ctx.sampling_ratio, ctx.aligned, _ = inputs
    ctx.save_for_backward(boxes)
    ctx.pooled = grad.shape[2:]


def _backward_double(ctx, grad):
    # The backward is linear in its gradient, and its own backward is the forward.
    (boxes,) = ctx.saved_tensors
    grad_grad = roi_align_op(grad, boxes, ctx.spatial_scale, *ctx.pooled, ctx.sampling_ratio, ctx.aligned)
    return grad_grad, *(None,) * 9


def _cast(input, boxes, *rest):
    return input, cast_boxes(input, boxes), *rest


def _vmap(info, in_dims, input, boxes, *rest):
    def pool(features, boxes):
        return roi_align_op(*features, boxes, *rest)

    return batch_forward(info.batch_size, in_dims[:1], in_dims[1], [input], boxes, pool)


def _vmap_backward(info, in_dims, grad, boxes, spatial_scale, batch_size, channels, *rest):
    def gradient(grad, boxes, images, channels):
        return [roi_align_backward_op(grad, boxes, spatial_scale, images, channels, *rest)]

    grads, dims = batch_backward(info.batch_size, in_dims[0], in_dims[1], grad, boxes, batch_size, channels, gradient)
    return grads[0], dims[0]


roi_align_backward_op = declare(
    "_roi_align_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt batch_size, SymInt channels, "
    "SymInt height, SymInt width, int sampling_ratio, bool aligned, bool channels_last) -> Tensor",
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_backward_double,
    autocast=_cast,
    vmap=_vmap_backward,
)

roi_align_op = declare(
    "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=_vmap,
)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pools each box of a feature map into a grid of bins, by averaging bilinear samples.

    Matches `torchvision.ops.roi_align`, with bfloat16, threads and a deterministic backward. A box with a coordinate
    that is not finite, or a batch index out of range, gives zeros and no gradient.

    Args:
        input (Tensor[N, C, H, W]): Feature maps; float16, bfloat16, float32 or float64; any strides.
        boxes (Tensor[K, 5] or list of N Tensor[K_i, 4]): (batch index, x1, y1, x2, y2), or (x1, y1, x2, y2) for each
            image, in pixels of the original image; dtype of ``input``, or float32 beside a 16-bit ``input``; not
            differentiable.
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel. Default: 1.0.
        sampling_ratio (int): Samples per bin and axis, at most 4096; <= 0: adaptive, ``ceil(box size / bins)``.
            Default: -1.
        aligned (bool): Shift the boxes by half a pixel, so that pixel centres are at .5. Default: False.

    Returns:
        Tensor[K, C, PH, PW], dtype and device of ``input``; channels_last where ``input`` is.

    Raises:
        RuntimeError: a shape, device or dtype does not fit.
        NotImplementedError: ``input`` is of another dtype.
        ValueError: ``output_size`` is not positive.
        TypeError: ``boxes`` is neither a Tensor nor a list of them.

    Note: deterministic forward and backward.
    Reference: He et al., Mask R-CNN, 2017, section 3.
    """
    pooled_height, pooled_width = as_pair("roi_align", "output_size", output_size)
    require_tensors("roi_align", input=input)
    require(input.dim() == 4, "roi_align", "input to have 4 dimensions [N, C, H, W]", input.shape)
    boxes = join_boxes("roi_align", boxes, input)
    check_map("roi_align", input, cast_boxes(input, boxes) if autocasts(input) else boxes)
    check_sampling("roi_align", sampling_ratio)
    return roi_align_op(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned)
