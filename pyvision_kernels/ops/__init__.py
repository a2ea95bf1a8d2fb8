"""Functional ops. One folder an op."""

from pyvision_kernels.ops.nms import nms
from pyvision_kernels.ops.roi_align import multiscale_roi_align, roi_align

__all__ = ["multiscale_roi_align", "nms", "roi_align"]
