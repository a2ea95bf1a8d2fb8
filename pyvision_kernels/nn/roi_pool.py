"""`RoIPool`, in place of `torchvision.ops.RoIPool`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.ops.roi_pool import roi_pool

# A leaf for torch.fx, as torchvision's is.
torch.fx.wrap("roi_pool")


class RoIPool(nn.Module):
    """Layer of :func:`pyvision_kernels.ops.roi_pool`; same constructor as `torchvision.ops.RoIPool`.

    Args:
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel.
    """

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """[N, C, H, W] and [K, 5] (or a list of [K_i, 4]) -> [K, C, PH, PW]."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
