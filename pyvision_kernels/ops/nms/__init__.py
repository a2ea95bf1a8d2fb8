"""Non-maximum suppression: schema, checks, and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvision_kernels._check import FLOATING, autocasts, require, require_tensors
from pyvision_kernels._op import declare


def _check(boxes: Tensor, scores: Tensor) -> None:
    require(boxes.dim() == 2 and boxes.size(1) == 4, "nms", "boxes to have size [N, 4]", boxes.shape)
    if scores.dim() != 1 or scores.size(0) != boxes.size(0):
        require(False, "nms", f"scores to have size [{boxes.size(0)}]", scores.shape)
    require(scores.device == boxes.device, "nms", "scores to be on the device of boxes", scores.device)
    if boxes.dtype not in FLOATING:
        raise NotImplementedError(
            f"nms: expected boxes to be float16, bfloat16, float32 or float64, but got {boxes.dtype}"
        )
    if scores.dtype != boxes.dtype:
        require(False, "nms", f"scores to be {boxes.dtype} as boxes is", scores.dtype)


def _fake(boxes, scores, iou_threshold):
    _check(boxes, scores)
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _cast(boxes, scores, *rest):
    if boxes.is_floating_point() and scores.is_floating_point() and torch.float64 not in (boxes.dtype, scores.dtype):
        boxes, scores = boxes.float(), scores.float()
    return boxes, scores, *rest


nms_op = declare(
    "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    fake=_fake,
    autocast=_cast,
)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps the boxes that no higher-scored kept box overlaps by more than a threshold.

    Equals `torchvision.ops.nms` on the CPU, index for index, on every device: stable order among equal scores, NaN
    scores first, the same rounding. 16-bit boxes are compared as float32.

    Args:
        boxes (Tensor[N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores (Tensor[N]): dtype of ``boxes``.
        iou_threshold (float): A box is dropped when its IoU with a kept box is greater.

    Returns:
        Tensor[M], int64: indices of the kept boxes, by descending score. On a GPU, reading M is the one
        synchronisation.

    Raises:
        RuntimeError: a shape, device or dtype does not fit.
        NotImplementedError: ``boxes`` is of another dtype.
        TypeError: ``boxes`` or ``scores`` is not a Tensor.

    Note: deterministic. Not differentiable.
    Reference: Neubeck and Van Gool, Efficient non-maximum suppression, 2006.
    """
    require_tensors("nms", boxes=boxes, scores=scores)
    _check(*(_cast(boxes, scores) if autocasts(boxes) else (boxes, scores)))
    return nms_op(boxes, scores, iou_threshold)
