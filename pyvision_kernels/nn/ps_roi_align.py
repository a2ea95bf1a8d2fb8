"""`PSRoIAlign` and `PSRoIPool`, in place of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.ops.ps_roi_align import ps_roi_align, ps_roi_pool

# A leaf for torch.fx, as torchvision's is.
torch.fx.wrap("ps_roi_align")
torch.fx.wrap("ps_roi_pool")


class PSRoIAlign(nn.Module):
    """Layer of :func:`pyvision_kernels.ops.ps_roi_align`; same constructor as `torchvision.ops.PSRoIAlign`.

    Args:
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel.
        sampling_ratio (int): Samples per bin and axis; <= 0: adaptive.
    """

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """[N, C * PH * PW, H, W] and [K, 5] (or a list of [K_i, 4]) -> [K, C, PH, PW]."""
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}"
        )


class PSRoIPool(nn.Module):
    """Layer of :func:`pyvision_kernels.ops.ps_roi_pool`; same constructor as `torchvision.ops.PSRoIPool`.

    Args:
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel.
    """

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """[N, C * PH * PW, H, W] and [K, 5] (or a list of [K_i, 4]) -> [K, C, PH, PW]."""
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
