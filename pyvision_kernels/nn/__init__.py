"""Drop-in layers: same constructor and state_dict as the layer replaced."""

from pyvision_kernels.nn.ps_roi_align import PSRoIAlign, PSRoIPool
from pyvision_kernels.nn.roi_align import RoIAlign

__all__ = ["PSRoIAlign", "PSRoIPool", "RoIAlign"]
