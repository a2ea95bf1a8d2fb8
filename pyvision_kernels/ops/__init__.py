"""Functional ops. One folder a family of functions that run the same kernels."""

from pyvision_kernels.ops.attention import attention
from pyvision_kernels.ops.attention.luong import dot_attention, general_attention
from pyvision_kernels.ops.avg_pool2d import adaptive_avg_pool2d, avg_pool1d, avg_pool2d
from pyvision_kernels.ops.batch_norm import batch_norm
from pyvision_kernels.ops.box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from pyvision_kernels.ops.conv2d import conv1d, conv2d, conv2d_max_pool2d, conv_transpose2d
from pyvision_kernels.ops.generalized_box_iou_loss import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)
from pyvision_kernels.ops.group_norm import group_norm
from pyvision_kernels.ops.interpolate import interpolate
from pyvision_kernels.ops.layer_norm import layer_norm
from pyvision_kernels.ops.linear import linear
from pyvision_kernels.ops.max_pool2d import adaptive_max_pool2d, max_pool1d, max_pool2d, max_unpool2d
from pyvision_kernels.ops.nms import batched_nms, batched_nms_padded, nms, soft_nms
from pyvision_kernels.ops.ps_roi_align import ps_roi_align, ps_roi_pool
from pyvision_kernels.ops.roi_align import multiscale_roi_align, roi_align
from pyvision_kernels.ops.roi_pool import roi_pool
from pyvision_kernels.ops.sigmoid_focal_loss import sigmoid_focal_loss
from pyvision_kernels.ops.softmax_cross_entropy import softmax_cross_entropy

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "attention",
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "batched_nms",
    "batched_nms_padded",
    "box_iou",
    "complete_box_iou",
    "complete_box_iou_loss",
    "conv1d",
    "conv2d",
    "conv2d_max_pool2d",
    "conv_transpose2d",
    "distance_box_iou",
    "distance_box_iou_loss",
    "dot_attention",
    "general_attention",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "group_norm",
    "interpolate",
    "layer_norm",
    "linear",
    "max_pool1d",
    "max_pool2d",
    "max_unpool2d",
    "multiscale_roi_align",
    "nms",
    "ps_roi_align",
    "ps_roi_pool",
    "roi_align",
    "roi_pool",
    "sigmoid_focal_loss",
    "soft_nms",
    "softmax_cross_entropy",
]
