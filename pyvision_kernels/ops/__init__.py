"""Functional ops. One folder an op."""

from pyvision_kernels.ops.nms import nms
from pyvision_kernels.ops.roi_align import roi_align
from pyvision_kernels.ops.roi_pool import roi_pool
from pyvision_kernels.ops.sigmoid_focal_loss import sigmoid_focal_loss

__all__ = ["nms", "roi_align", "roi_pool", "sigmoid_focal_loss"]
