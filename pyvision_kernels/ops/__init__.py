"""Functional ops. One folder an op."""

from pyvision_kernels.ops.box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from pyvision_kernels.ops.generalized_box_iou_loss import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)
from pyvision_kernels.ops.nms import nms
from pyvision_kernels.ops.roi_align import roi_align

__all__ = [
    "box_iou",
    "complete_box_iou",
    "complete_box_iou_loss",
    "distance_box_iou",
    "distance_box_iou_loss",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "nms",
    "roi_align",
]
