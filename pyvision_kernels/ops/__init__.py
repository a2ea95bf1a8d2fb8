"""Functional ops. One folder an op."""

from pyvision_kernels.ops.nms import batched_nms, batched_nms_padded, nms, soft_nms
from pyvision_kernels.ops.roi_align import roi_align

__all__ = ["batched_nms", "batched_nms_padded", "nms", "roi_align", "soft_nms"]
