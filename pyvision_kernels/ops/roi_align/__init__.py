"""RoI align: schema, checks, gradient, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._check import FLOATING, as_pair, autocasts, require, require_tensors
from pyvision_kernels._op import declare

MAX_SAMPLING_RATIO = 4096  # of samples per bin and axis: what is asked for beyond is a mistake, and would not end


def _check(input: Tensor, boxes: Tensor, op: str = "roi_align") -> None:
    require(input.dim() == 4, op, "input to have 4 dimensions [N, C, H, W]", input.shape)
    require(boxes.dim() == 2 and boxes.size(1) == 5, op, "boxes to have size [K, 5]", boxes.shape)
    require(boxes.device == input.device, op, "boxes to be on the device of input", boxes.device)
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{op}: expected input to be float16, bfloat16, float32 or float64, but got {input.dtype}"
        )
    if boxes.dtype != input.dtype:
        mixed = boxes.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
        require(mixed, op, f"boxes to be {input.dtype} as input is, or float32 beside a 16-bit input", boxes.dtype)


def _check_sampling(sampling_ratio: int, op: str = "roi_align") -> None:
    require(
        sampling_ratio <= MAX_SAMPLING_RATIO, op, f"sampling_ratio to be at most {MAX_SAMPLING_RATIO}", sampling_ratio
    )


def _is_channels_last(input: Tensor) -> bool:
    return input.stride(1) == 1 and not input.is_contiguous()


def _empty(like: Tensor, size: Sequence[Any], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _fake(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    _check(input, boxes)
    _check_sampling(sampling_ratio)
    size = (boxes.size(0), input.size(1), pooled_height, pooled_width)
    return _empty(input, size, _is_channels_last(input))


def _fake_backward(grad, boxes, spatial_scale, batch_size, channels, height, width, sampling_ratio, aligned, last):
    _check(grad, boxes, "_roi_align_backward")
    _check_sampling(sampling_ratio, "_roi_align_backward")
    return _empty(grad, (batch_size, channels, height, width), last)


def _setup(ctx, inputs, output):
    input, boxes, ctx.spatial_scale, _, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(boxes)
    ctx.input_size = input.shape
    ctx.channels_last = _is_channels_last(input)


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
    # As torchvision: sampled in float32, returned in the dtype of input. The kernels accumulate in float32 anyway.
    if boxes.is_floating_point() and torch.float64 not in (input.dtype, boxes.dtype):
        boxes = boxes.float()
    return input, boxes, *rest


def _split_boxes(boxes: Tensor, batches: int, images: int) -> Tensor:
    """[B, K, 5] -> [B * K, 5] over B * N images; an index outside its own N images becomes -1, which gives zeros."""
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    index = boxes[..., :1].trunc()
    offset = torch.arange(batches, device=boxes.device, dtype=boxes.dtype).mul_(images).view(-1, 1, 1)
    inside = (boxes[..., :1] > -1) & (index < images)
    index = torch.where(inside, index + offset, -1.0)
    return torch.cat([index, boxes[..., 1:]], -1).flatten(0, 1)


def _vmap(info, in_dims, input, boxes, spatial_scale, pooled_height, pooled_width, *rest):
    size = info.batch_size
    rest = (spatial_scale, pooled_height, pooled_width, *rest)
    if in_dims[1] is None:  # the same boxes for all: fold the batch into the channels
        folded = input.movedim(in_dims[0], 1)
        out = roi_align_op(folded.flatten(1, 2), boxes, *rest)
        return out.unflatten(1, (size, folded.size(2))), 1
    boxes = boxes.movedim(in_dims[1], 0)
    if in_dims[0] is None:
        out = roi_align_op(input, boxes.flatten(0, 1), *rest)
    else:
        input = input.movedim(in_dims[0], 0)
        out = roi_align_op(input.flatten(0, 1), _split_boxes(boxes, size, input.size(1)), *rest)
    return out.unflatten(0, (size, boxes.size(1))), 0


def _vmap_backward(info, in_dims, grad, boxes, spatial_scale, batch_size, channels, height, width, *rest):
    size = info.batch_size
    if in_dims[1] is None:
        folded = grad.movedim(in_dims[0], 1).flatten(1, 2)
        out = roi_align_backward_op(folded, boxes, spatial_scale, batch_size, size * channels, height, width, *rest)
        return out.unflatten(1, (size, channels)), 1
    boxes = boxes.movedim(in_dims[1], 0)
    grad = grad.movedim(in_dims[0], 0) if in_dims[0] is not None else grad.expand(size, *grad.shape)
    images = (spatial_scale, size * batch_size, channels, height, width)
    out = roi_align_backward_op(grad.flatten(0, 1), _split_boxes(boxes, size, batch_size), *images, *rest)
    return out.unflatten(0, (size, batch_size)), 0


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


def _join_boxes(boxes: Tensor | Sequence[Tensor], input: Tensor, op: str = "roi_align") -> Tensor:
    """A list of [K_i, 4], one for each image, becomes [K, 5]."""
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, list | tuple) or not all(isinstance(item, Tensor) for item in boxes):
        raise TypeError(f"{op}: expected boxes to be a Tensor or a list of Tensors, but got {type(boxes).__name__}")
    for item in boxes:
        require(item.dim() == 2 and item.size(1) == 4, op, "each of boxes to have size [K, 4]", item.shape)
    require(len(boxes) == input.size(0), op, f"one Tensor of boxes for each of {input.size(0)} images", len(boxes))
    if not boxes:
        return input.new_empty((0, 5))
    # An index beyond 256 needs more than 16 bits: cat() promotes, and float32 boxes go with every 16-bit input.
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    index = [item.new_full((item.size(0), 1), image, dtype=wide) for image, item in enumerate(boxes)]
    return torch.cat([torch.cat(index), torch.cat(list(boxes))], dim=1)


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
    boxes = _join_boxes(boxes, input)
    _check(*(_cast(input, boxes) if autocasts(input) else (input, boxes)))
    _check_sampling(sampling_ratio)
    return roi_align_op(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned)
