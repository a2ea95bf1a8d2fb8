"""Drop-in layers: same constructor and state_dict as the layer replaced."""

from pyvision_kernels.nn.roi_align import RoIAlign
from pyvision_kernels.nn.roi_pool import RoIPool

__all__ = ["RoIAlign", "RoIPool"]
