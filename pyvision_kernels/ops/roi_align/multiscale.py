"""RoI align over a feature pyramid: schema, checks, gradient, and the public function."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyvision_kernels._check import FLOATING, as_pair, autocasts, require
from pyvision_kernels._op import declare
from pyvision_kernels._rois import (
    batch_backward,
    batch_forward,
    cast_boxes,
    check_boxes,
    check_sampling,
    empty,
    is_channels_last,
    join_boxes,
)
from pyvision_kernels.ops.roi_align.levels import level_areas

OP = "multiscale_roi_align"
MAX_LEVELS = 16


def _check_features(features: Sequence[Tensor], scales: Sequence[float]) -> None:
    require(1 <= len(features) <= MAX_LEVELS, OP, f"between 1 and {MAX_LEVELS} features", len(features))
    require(len(scales) == len(features), OP, f"one of scales for each of {len(features)} features", len(scales))
    first = features[0]
    for item in features:
        require(item.dim() == 4, OP, "each of features to have 4 dimensions [N, C, H, W]", item.shape)
        if item.dtype not in FLOATING:
            raise NotImplementedError(
                f"{OP}: expected each of features to be float16, bfloat16, float32 or float64, but got {item.dtype}"
            )
        if item is first:
            continue
        require(
            item.size(0) == first.size(0) and item.size(1) == first.size(1),
            OP,
            f"each of features to have {first.size(0)} images and {first.size(1)} channels as the first has",
            item.shape,
        )
        require(item.device == first.device, OP, "each of features to be on the device of the first", item.device)
        require(item.dtype == first.dtype, OP, f"each of features to be {first.dtype} as the first is", item.dtype)


def _fake(features, boxes, scales, areas, pooled_height, pooled_width, sampling_ratio, aligned):
    _check_features(features, scales)
    check_boxes(OP, features[0], boxes)
    check_sampling(OP, sampling_ratio)
    size = (boxes.size(0), features[0].size(1), pooled_height, pooled_width)
    return empty(features[0], size, is_channels_last(features[0]))


def _fake_backward(
    grad, boxes, scales, areas, batch_size, channels, heights, widths, sampling_ratio, aligned, channels_last
):
    check_boxes("_multiscale_roi_align_backward", grad, boxes)
    check_sampling("_multiscale_roi_align_backward", sampling_ratio)
    sizes = zip(heights, widths, strict=True)
    return [empty(grad, (batch_size, channels, height, width), channels_last) for height, width in sizes]


def _setup(ctx, inputs, output):
    features, boxes, ctx.scales, ctx.areas, _, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(boxes)
    ctx.batch_size, ctx.channels = features[0].shape[:2]
    ctx.heights = [item.size(2) for item in features]
    ctx.widths = [item.size(3) for item in features]
    ctx.channels_last = is_channels_last(features[0])


def _backward(ctx, grad):
    (boxes,) = ctx.saved_tensors
    sizes = (ctx.batch_size, ctx.channels, ctx.heights, ctx.widths)
    options = (ctx.sampling_ratio, ctx.aligned, ctx.channels_last)
    grads = multiscale_backward_op(grad, boxes, ctx.scales, ctx.areas, *sizes, *options)
    return list(grads), None, None, _no_gradient(ctx.areas), *(None,) * 4


def _no_gradient(numbers):
    return None if numbers else []  # torch takes an empty list for one of Tensors, and wants its structure back


def _setup_double(ctx, inputs, output):
    grad, boxes, ctx.scales, ctx.areas, *_, ctx.sampling_ratio, ctx.aligned, _ = inputs
    ctx.save_for_backward(boxes)
    ctx.pooled = grad.shape[2:]


def _backward_double(ctx, grads):
    (boxes,) = ctx.saved_tensors
    options = (ctx.scales, ctx.areas, *ctx.pooled, ctx.sampling_ratio, ctx.aligned)
    return multiscale_op(list(grads), boxes, *options), None, None, _no_gradient(ctx.areas), *(None,) * 7


def _cast(features, boxes, *rest):
    return features, cast_boxes(features[0], boxes), *rest


def _cast_backward(grad, boxes, *rest):
    return grad, cast_boxes(grad, boxes), *rest


def _vmap(info, in_dims, features, boxes, *rest):
    def pool(features, boxes):
        return multiscale_op(features, boxes, *rest)

    dims = in_dims[0] or [None] * len(features)
    return batch_forward(info.batch_size, dims, in_dims[1], features, boxes, pool)


def _vmap_backward(info, in_dims, grad, boxes, scales, areas, batch_size, channels, *rest):
    def gradient(grad, boxes, images, channels):
        return multiscale_backward_op(grad, boxes, scales, areas, images, channels, *rest)

    return batch_backward(info.batch_size, in_dims[0], in_dims[1], grad, boxes, batch_size, channels, gradient)


multiscale_backward_op = declare(
    "_multiscale_roi_align_backward(Tensor grad, Tensor boxes, float[] scales, float[] areas, SymInt batch_size, "
    "SymInt channels, SymInt[] heights, SymInt[] widths, int sampling_ratio, bool aligned, bool channels_last) "
    "-> Tensor[]",
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_backward_double,
    autocast=_cast_backward,
    vmap=_vmap_backward,
)

multiscale_op = declare(
    "multiscale_roi_align(Tensor[] features, Tensor boxes, float[] scales, float[] areas, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=_vmap,
)


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    aligned: bool = False,
) -> Tensor:
    """Pools each box from the level of a feature pyramid that fits its size, by :func:`roi_align`.

    Matches `torchvision.ops.MultiScaleRoIAlign`. A box of area A belongs to the level
    ``floor(canonical_level + log2(sqrt(A) / canonical_scale))``, held between those of the first and of the last map;
    the map with scale ``2 ** -k`` is level k. With a single map there is no choice. A box of negative area, of a
    level that no map has, with a coordinate that is not finite, or with a batch index out of range, gives zeros and
    no gradient.

    Args:
        features (list of Tensor[N, C, H_l, W_l]): At most 16 maps, from the finest to the coarsest; float16, bfloat16,
            float32 or float64; any strides.
        boxes (Tensor[K, 5] or list of N Tensor[K_i, 4]): (batch index, x1, y1, x2, y2), or (x1, y1, x2, y2) for each
            image, in pixels of the original image; dtype of ``features``, or float32 beside 16-bit ``features``; not
            differentiable.
        output_size (int or (int, int)): Bins (PH, PW).
        scales (list of float): Feature pixels per image pixel, of each map.
        sampling_ratio (int): Samples per bin and axis, at most 4096; <= 0: adaptive. Default: 2.
        canonical_scale (float): Side of a square box that belongs to ``canonical_level``. Default: 224.
        canonical_level (float): Default: 4.
        aligned (bool): Shift the boxes by half a pixel. Default: False.

    Returns:
        Tensor[K, C, PH, PW], dtype and device of ``features[0]``; channels_last where that is.

    Raises:
        RuntimeError: a shape, device or dtype does not fit, or the scales do not descend.
        NotImplementedError: ``features`` are of another dtype.
        ValueError: ``output_size`` is not positive.
        TypeError: ``features`` is not a list of Tensors, ``boxes`` neither a Tensor nor a list of them.

    Note: deterministic forward and backward. Under autocast, maps of different dtypes are pooled in the widest, and the
        result has the dtype of the first.
    Reference: Lin et al., Feature Pyramid Networks for Object Detection, 2017, equation 1.
    """
    pooled_height, pooled_width = as_pair(OP, "output_size", output_size)
    if not isinstance(features, list | tuple) or not all(isinstance(item, Tensor) for item in features):
        raise TypeError(f"{OP}: expected features to be a list of Tensors, but got {type(features).__name__}")
    features = list(features)
    dtype = features[0].dtype if features else None
    casts = len(features) > 0 and autocasts(features[0])
    if casts and any(item.dtype != dtype for item in features):
        widest = functools.reduce(torch.promote_types, (item.dtype for item in features))
        features = [item.to(widest) for item in features]
    _check_features(features, scales)
    first = features[0]
    boxes = join_boxes(OP, boxes, first)
    check_boxes(OP, first, cast_boxes(first, boxes) if casts else boxes)
    check_sampling(OP, sampling_ratio)
    scales = [float(scale) for scale in scales]
    if torch.compiler.is_compiling():  # numbers may be symbols there, and areas need values
        guard_scalar = torch.fx.experimental.symbolic_shapes.guard_scalar
        scales = [guard_scalar(scale) for scale in scales]
        canonical_scale, canonical_level = guard_scalar(canonical_scale), guard_scalar(canonical_level)
    areas = level_areas(OP, tuple(scales), canonical_scale, canonical_level, first.dtype == torch.float64)
    pooled = multiscale_op(features, boxes, scales, areas, pooled_height, pooled_width, sampling_ratio, aligned)
    return pooled if pooled.dtype == dtype else pooled.to(dtype)
