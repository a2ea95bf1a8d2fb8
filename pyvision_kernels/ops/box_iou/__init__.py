"""Pairwise overlap of boxes: schema, checks, gradients, and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._box_pairs import (
    backward_by,
    check_types,
    double_backward_of,
    empty_gradients,
    result_dtype,
    setup,
    setup_double,
)
from pyvision_kernels._check import FLOATING, require, require_tensors
from pyvision_kernels._op import declare
from pyvision_kernels.ops.box_iou.reference import FORMATS, KINDS, pairwise

PLAIN, GENERALIZED, DISTANCE, COMPLETE = range(len(KINDS))


def _check(op: str, boxes1: Tensor, boxes2: Tensor) -> None:
    rank = boxes1.dim()
    require(rank in (2, 3) and boxes1.size(-1) == 4, op, "boxes1 to have size [N, 4] or [B, N, 4]", boxes1.shape)
    fits = boxes2.dim() == rank and boxes2.size(-1) == 4 and (rank == 2 or boxes2.size(0) == boxes1.size(0))
    require(fits, op, "boxes2 to have size [M, 4] or [B, M, 4] as boxes1 has", boxes2.shape)
    check_types(op, boxes1, boxes2)


def _fake(boxes1, boxes2, kind, fmt, eps):
    _check("box_iou", boxes1, boxes2)
    return boxes1.new_empty((*boxes1.shape[:-1], boxes2.size(-2)), dtype=result_dtype(boxes1))


def _fake_backward(grad, boxes1, boxes2, kind, fmt, eps, need1, need2):
    _check("_box_iou_backward", boxes1, boxes2)
    return empty_gradients(boxes1, boxes2, need1, need2)


def _formula(boxes1, boxes2, kind, fmt, eps):
    return pairwise(boxes1, boxes2, KINDS[kind], FORMATS[fmt], eps)


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """With the vmapped dimension in front, and merged with a batch that was there."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1) if tensor.dim() == 4 else tensor


def _vmap(info, in_dims, boxes1, boxes2, *rest):
    nested = boxes1.dim() - (in_dims[0] is not None) == 3
    size = info.batch_size
    out = box_iou_op(_batched(boxes1, in_dims[0], size), _batched(boxes2, in_dims[1], size), *rest)
    return out.unflatten(0, (size, -1)) if nested else out, 0


def _vmap_backward(info, in_dims, grad, boxes1, boxes2, *rest):
    nested = boxes1.dim() - (in_dims[1] is not None) == 3
    size, need = info.batch_size, rest[-2:]
    tensors = [_batched(tensor, dim, size) for tensor, dim in zip((grad, boxes1, boxes2), in_dims[:3], strict=True)]
    grads = box_iou_backward_op(*tensors, *rest)
    if nested:
        grads = [grad.unflatten(0, (size, -1)) if needed else grad for grad, needed in zip(grads, need, strict=True)]
    # What is not needed is empty, and the same for all.
    return (grads[0], grads[1]), (0 if need[0] else None, 0 if need[1] else None)


box_iou_backward_op = declare(
    "_box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int kind, int fmt, float eps, bool need1, "
    "bool need2) -> (Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=setup_double,
    backward=double_backward_of(_formula),
    vmap=_vmap_backward,
)

box_iou_op = declare(
    "box_iou(Tensor boxes1, Tensor boxes2, int kind, int fmt, float eps) -> Tensor",
    fake=_fake,
    setup_context=setup,
    backward=backward_by(lambda: box_iou_backward_op),
    vmap=_vmap,
)


def _overlap(op: str, boxes1: Tensor, boxes2: Tensor, kind: int, fmt: int = 0, eps: float = 0.0) -> Tensor:
    require_tensors(op, boxes1=boxes1, boxes2=boxes2)
    if boxes1.dim() == 2 and boxes2.dim() == 2 and boxes1.dtype == boxes2.dtype and boxes1.dtype in FLOATING:
        _check(op, boxes1, boxes2)
        return box_iou_op(boxes1, boxes2, kind, fmt, eps)
    return _overlap_of_any(op, boxes1, boxes2, kind, fmt, eps)


def _overlap_of_any(op: str, boxes1: Tensor, boxes2: Tensor, kind: int, fmt: int, eps: float) -> Tensor:
    """Leading dimensions, integers, two dtypes."""
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        require(boxes.dim() >= 2 and boxes.size(-1) == 4, op, f"{name} to have size [..., 4]", boxes.shape)
        is_integer = not (boxes.is_floating_point() or boxes.is_complex() or boxes.dtype == torch.bool)
        if boxes.dtype not in FLOATING and not is_integer:
            raise NotImplementedError(
                f"{op}: expected {name} to be float16, bfloat16, float32, float64 or of an integer type, "
                f"but got {boxes.dtype}"
            )
    integers = not boxes1.is_floating_point() and not boxes2.is_floating_point()
    if integers:  # exact in float64
        boxes1, boxes2 = boxes1.double(), boxes2.double()
    elif boxes1.dtype != boxes2.dtype:
        wide = torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32
        boxes1, boxes2 = boxes1.to(wide), boxes2.to(wide)
    leading = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    if leading:
        boxes1, boxes2 = (boxes.expand(*leading, *boxes.shape[-2:]).flatten(0, -3) for boxes in (boxes1, boxes2))
    _check(op, boxes1, boxes2)
    out: Any = box_iou_op(boxes1, boxes2, kind, fmt, eps)
    out = out.unflatten(0, leading) if len(leading) > 1 else out
    return out.float() if integers else out


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """The intersection over union of every box of one set with every box of another.

    Matches `torchvision.ops.box_iou`, bit for bit in float32, and its gradients.

    Args:
        boxes1 (Tensor[..., N, 4]): float16, bfloat16, float32, float64 or integers; any strides.
        boxes2 (Tensor[..., M, 4]): The other set.
        fmt (str): "xyxy" for (x1, y1, x2, y2), "xywh" or "cxcywh". Default: "xyxy".

    Returns:
        Tensor[..., N, M], float64 where ``boxes1`` or ``boxes2`` is, else float32.

    Raises:
        RuntimeError: a shape or device does not fit.
        NotImplementedError: boxes of another dtype.
        ValueError: ``fmt`` is none of the three.
        TypeError: ``boxes1`` or ``boxes2`` is not a Tensor.

    Note: deterministic forward and backward.
    Reference: Everingham et al., The PASCAL Visual Object Classes Challenge, 2010.
    """
    if fmt not in FORMATS:
        raise ValueError(f"Unsupported format '{fmt}'. Supported axis-aligned formats: {FORMATS}.")
    return _overlap("box_iou", boxes1, boxes2, PLAIN, FORMATS.index(fmt))


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The generalized IoU of all pairs: IoU less the share of the enclosing box that neither box covers.

    Matches `torchvision.ops.generalized_box_iou`, bit for bit in float32, and its gradients.

    Args:
        boxes1 (Tensor[..., N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32, float64 or integers; any strides.
        boxes2 (Tensor[..., M, 4]): The other set.

    Returns:
        Tensor[..., N, M], float64 where ``boxes1`` or ``boxes2`` is, else float32.

    Raises:
        RuntimeError: a shape or device does not fit.
        NotImplementedError: boxes of another dtype.
        TypeError: ``boxes1`` or ``boxes2`` is not a Tensor.

    Note: deterministic forward and backward.
    Reference: Rezatofighi et al., Generalized Intersection over Union, 2019.
    """
    return _overlap("generalized_box_iou", boxes1, boxes2, GENERALIZED)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """The distance IoU of all pairs: IoU less the squared distance of the centres by the enclosing squared diagonal.

    Matches `torchvision.ops.distance_box_iou`, bit for bit in float32, and its gradients.

    Args:
        boxes1 (Tensor[..., N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32, float64 or integers; any strides.
        boxes2 (Tensor[..., M, 4]): The other set.
        eps (float): Added to the squared diagonal. Default: 1e-7.

    Returns:
        Tensor[..., N, M], float64 where ``boxes1`` or ``boxes2`` is, else float32.

    Raises:
        RuntimeError: a shape or device does not fit.
        NotImplementedError: boxes of another dtype.
        TypeError: ``boxes1`` or ``boxes2`` is not a Tensor.

    Note: deterministic forward and backward.
    Reference: Zheng et al., Distance-IoU Loss, 2020.
    """
    return _overlap("distance_box_iou", boxes1, boxes2, DISTANCE, 0, eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """The complete IoU of all pairs: the distance IoU less a weighted difference of aspect ratios.

    Matches `torchvision.ops.complete_box_iou` to the rounding of an arc tangent, and its gradients. The weight of the
    aspect ratios, alpha, has no gradient.

    Args:
        boxes1 (Tensor[..., N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32, float64 or integers; any strides.
        boxes2 (Tensor[..., M, 4]): The other set.
        eps (float): Added to the squared diagonal and to alpha's denominator. Default: 1e-7.

    Returns:
        Tensor[..., N, M], float64 where ``boxes1`` or ``boxes2`` is, else float32.

    Raises:
        RuntimeError: a shape or device does not fit.
        NotImplementedError: boxes of another dtype.
        TypeError: ``boxes1`` or ``boxes2`` is not a Tensor.

    Note: deterministic forward and backward.
    Reference: Zheng et al., Distance-IoU Loss, 2020, section 4.
    """
    return _overlap("complete_box_iou", boxes1, boxes2, COMPLETE, 0, eps)
