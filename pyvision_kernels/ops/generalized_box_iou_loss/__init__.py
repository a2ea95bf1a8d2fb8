"""Losses of box regression: schema, checks, gradients, and the public functions."""

from __future__ import annotations

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
from pyvision_kernels.ops.generalized_box_iou_loss.reference import KINDS, REDUCTIONS
from pyvision_kernels.ops.generalized_box_iou_loss.reference import loss as reference_loss

GENERALIZED, DISTANCE, COMPLETE = 1, 2, 3
NONE, MEAN, SUM = range(len(REDUCTIONS))


def _check(op: str, boxes1: Tensor, boxes2: Tensor) -> None:
    require(boxes1.dim() == 2 and boxes1.size(1) == 4, op, "boxes1 to have size [N, 4]", boxes1.shape)
    if boxes2.shape != boxes1.shape:
        require(False, op, f"boxes2 to have size {list(boxes1.shape)} as boxes1 has", boxes2.shape)
    check_types(op, boxes1, boxes2)


def _fake(boxes1, boxes2, kind, reduction, eps):
    _check("box_iou_loss", boxes1, boxes2)
    return boxes1.new_empty(boxes1.shape[:1] if reduction == NONE else (), dtype=result_dtype(boxes1))


def _fake_backward(grad, boxes1, boxes2, kind, reduction, eps, need1, need2):
    _check("_box_iou_loss_backward", boxes1, boxes2)
    return empty_gradients(boxes1, boxes2, need1, need2)


def _formula(boxes1, boxes2, kind, reduction, eps):
    return reference_loss(boxes1, boxes2, KINDS[kind], REDUCTIONS[reduction], eps)


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap(info, in_dims, boxes1, boxes2, kind, reduction, eps):
    """All losses at once; a reduction is then PyTorch's, of each."""
    size = info.batch_size
    flat = [_front(boxes, dim, size).flatten(0, 1) for boxes, dim in zip((boxes1, boxes2), in_dims, strict=False)]
    each = box_iou_loss_op(*flat, kind, NONE, eps).unflatten(0, (size, -1))
    if reduction == NONE:
        return each, 0
    return (each.mean(1) if reduction == MEAN and each.size(1) > 0 else each.sum(1)), 0


def _vmap_backward(info, in_dims, grad, boxes1, boxes2, kind, reduction, eps, need1, need2):
    size = info.batch_size
    grad, boxes1, boxes2 = (_front(*pair, size) for pair in zip((grad, boxes1, boxes2), in_dims, strict=False))
    count = boxes1.size(1)
    if reduction != NONE:
        grad = (grad / max(count, 1) if reduction == MEAN else grad).unsqueeze(1).expand(size, count)
    flat = [tensor.flatten(0, 1) for tensor in (grad, boxes1, boxes2)]
    grads = box_iou_loss_backward_op(*flat, kind, NONE, eps, need1, need2)
    grads = [grad.unflatten(0, (size, -1)) if need else grad for grad, need in zip(grads, (need1, need2), strict=True)]
    # What is not needed is empty, and the same for all.
    return (grads[0], grads[1]), (0 if need1 else None, 0 if need2 else None)


box_iou_loss_backward_op = declare(
    "_box_iou_loss_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int kind, int reduction, float eps, "
    "bool need1, bool need2) -> (Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=setup_double,
    backward=double_backward_of(_formula),
    vmap=_vmap_backward,
)

box_iou_loss_op = declare(
    "box_iou_loss(Tensor boxes1, Tensor boxes2, int kind, int reduction, float eps) -> Tensor",
    fake=_fake,
    setup_context=setup,
    backward=backward_by(lambda: box_iou_loss_backward_op),
    vmap=_vmap,
)


def _loss(op: str, boxes1: Tensor, boxes2: Tensor, kind: int, reduction: str, eps: float) -> Tensor:
    require_tensors(op, boxes1=boxes1, boxes2=boxes2)
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: 'none', 'mean', 'sum'"
        )
    if boxes1.dim() == 2 and boxes1.shape == boxes2.shape and boxes1.dtype == boxes2.dtype and boxes1.dtype in FLOATING:
        _check(op, boxes1, boxes2)
        return box_iou_loss_op(boxes1, boxes2, kind, REDUCTIONS.index(reduction), eps)
    return _loss_of_any(op, boxes1, boxes2, kind, reduction, eps)


def _loss_of_any(op: str, boxes1: Tensor, boxes2: Tensor, kind: int, reduction: str, eps: float) -> Tensor:
    """Other leading dimensions, broadcasting, integers, two dtypes."""
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        require(boxes.dim() >= 1 and boxes.size(-1) == 4, op, f"{name} to have size [..., 4]", boxes.shape)
        if boxes.dtype not in FLOATING and (boxes.is_floating_point() or boxes.is_complex()):
            raise NotImplementedError(
                f"{op}: expected {name} to be float16, bfloat16, float32, float64 or of an integer type, "
                f"but got {boxes.dtype}"
            )
    try:
        size = torch.broadcast_shapes(boxes1.shape, boxes2.shape)
    except RuntimeError:
        require(False, op, f"boxes2 to have size {list(boxes1.shape)} as boxes1 has", boxes2.shape)
        raise
    if boxes1.dtype != boxes2.dtype or boxes1.dtype not in FLOATING:
        wide = torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32
        boxes1, boxes2 = boxes1.to(wide), boxes2.to(wide)
    flat = [boxes.expand(size).reshape(-1, 4) for boxes in (boxes1, boxes2)]
    _check(op, flat[0], flat[1])
    loss: Tensor = box_iou_loss_op(*flat, kind, REDUCTIONS.index(reduction), eps)
    return loss.reshape(size[:-1]) if reduction == "none" else loss


def generalized_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """One minus the generalized IoU of each pair of boxes.

    Matches `torchvision.ops.generalized_box_iou_loss`, and its gradients.

    Args:
        boxes1 (Tensor[..., 4]): (x1, y1, x2, y2); float16, bfloat16, float32, float64 or integers; any strides.
        boxes2 (Tensor[..., 4]): The boxes to compare with, of the same size.
        reduction (str): "none", "mean" or "sum". Default: "none".
        eps (float): Added to the areas that are divided by. Default: 1e-7.

    Returns:
        Tensor[...], or of no dimension where reduced; float64 where a set of boxes is, else float32. The mean of
        nothing is 0.

    Raises:
        RuntimeError: a shape or device does not fit.
        NotImplementedError: boxes of another dtype.
        ValueError: ``reduction`` is none of the three.
        TypeError: ``boxes1`` or ``boxes2`` is not a Tensor.

    Note: deterministic forward and backward.
    Reference: Rezatofighi et al., Generalized Intersection over Union, 2019.
    """
    return _loss("generalized_box_iou_loss", boxes1, boxes2, GENERALIZED, reduction, eps)


def distance_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """One minus the distance IoU of each pair of boxes.

    Matches `torchvision.ops.distance_box_iou_loss`, and its gradients.

    Args:
        boxes1 (Tensor[..., 4]): (x1, y1, x2, y2); float16, bfloat16, float32, float64 or integers; any strides.
        boxes2 (Tensor[..., 4]): The boxes to compare with, of the same size.
        reduction (str): "none", "mean" or "sum". Default: "none".
        eps (float): Added to the union and to the squared diagonal. Default: 1e-7.

    Returns:
        Tensor[...], or of no dimension where reduced; float64 where a set of boxes is, else float32. The mean of
        nothing is 0.

    Raises:
        RuntimeError: a shape or device does not fit.
        NotImplementedError: boxes of another dtype.
        ValueError: ``reduction`` is none of the three.
        TypeError: ``boxes1`` or ``boxes2`` is not a Tensor.

    Note: deterministic forward and backward.
    Reference: Zheng et al., Distance-IoU Loss, 2020.
    """
    return _loss("distance_box_iou_loss", boxes1, boxes2, DISTANCE, reduction, eps)


def complete_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """One minus the complete IoU of each pair of boxes.

    Matches `torchvision.ops.complete_box_iou_loss`, and its gradients. The weight of the aspect ratios, alpha, has no
    gradient.

    Args:
        boxes1 (Tensor[..., 4]): (x1, y1, x2, y2); float16, bfloat16, float32, float64 or integers; any strides.
        boxes2 (Tensor[..., 4]): The boxes to compare with, of the same size.
        reduction (str): "none", "mean" or "sum". Default: "none".
        eps (float): Added to alpha's denominator; the others have 1e-7, as in torchvision. Default: 1e-7.

    Returns:
        Tensor[...], or of no dimension where reduced; float64 where a set of boxes is, else float32. The mean of
        nothing is 0.

    Raises:
        RuntimeError: a shape or device does not fit.
        NotImplementedError: boxes of another dtype.
        ValueError: ``reduction`` is none of the three.
        TypeError: ``boxes1`` or ``boxes2`` is not a Tensor.

    Note: deterministic forward and backward.
    Reference: Zheng et al., Distance-IoU Loss, 2020, section 4.
    """
    return _loss("complete_box_iou_loss", boxes1, boxes2, COMPLETE, reduction, eps)
