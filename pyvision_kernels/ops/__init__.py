"""Functional ops. One folder an op."""

from pyvision_kernels.ops.nms import nms
from pyvision_kernels.ops.ps_roi_align import ps_roi_align, ps_roi_pool
from pyvision_kernels.ops.roi_align import roi_align

__all__ = ["nms", "ps_roi_align", "ps_roi_pool", "roi_align"]
