"""`RoIAlign`, in place of `torchvision.ops.RoIAlign`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.ops.roi_align import roi_align

# A leaf for torch.fx, as torchvision's is.
torch.fx.wrap("roi_align")


class RoIAlign(nn.Module):
    """Layer of :func:`pyvision_kernels.ops.roi_align`; same constructor as `torchvision.ops.RoIAlign`.

    Args:
        output_size (int or (int, int)): Bins (PH, PW).
        spatial_scale (float): Feature pixels per image pixel.
        sampling_ratio (int): Samples per bin and axis; <= 0: adaptive.
        aligned (bool): Shift the boxes by half a pixel. Default: False.
    """

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """[N, C, H, W] and [K, 5] (or a list of [K_i, 4]) -> [K, C, PH, PW]."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
